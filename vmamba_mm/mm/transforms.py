"""The training transforms of the ImageNet recipe, faster: ``type='vmamba_mm.RandAugment'``, ...

Each class subclasses mmpretrain's or mmcv's of the same name, takes the same arguments and draws
the same numbers from numpy's generator in the same order, so a seed gives the stock image: bit for
bit, but for the two steps that say otherwise (RandomResizedCrop with backend 'torch', the noise of
RandomErasing). Images are (H, W, 3) uint8 arrays. tools/bench/data_pipeline.py times each step.
"""

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import RandomFlip as MMCVRandomFlip
from mmcv.transforms.utils import cache_randomness

from vmamba_mm.config import scopes_of, type_name
from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.registry import TRANSFORMS

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmpretrain.datasets import transforms as stock  # noqa: E402
from mmpretrain.datasets.transforms.auto_augment import RANDAUG_POLICIES  # noqa: E402

RAMP = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)


@TRANSFORMS.register_module()
class RandomResizedCrop(stock.RandomResizedCrop):
    """Stock, with ``backend`` 'torch' (the default: interpolate's uint8 kernel) or 'pillow'.

    'pillow' gives the stock bits. 'torch' computes the same antialiased filter, and 95 % of the
    values are equal. The others are one grey level apart: both round after each axis, and Pillow 13
    filters the columns first in some crops. In one value of 10,000 it is more, where the first
    axis overshoots and is cut to 0 or 255. Both are equally far from the filter in floating point.

    Raises ValueError for another backend, or an interpolation that torch has no such kernel for.
    """

    def __init__(self, *args, interpolation='bilinear', backend='torch', **kwargs):
        if backend not in ('torch', 'pillow'):
            raise ValueError(f"backend must be 'torch' or 'pillow', not {backend!r}")
        if backend == 'torch' and interpolation not in ('bilinear', 'bicubic'):
            raise ValueError("interpolation must be 'bilinear' or 'bicubic' with backend='torch', "
                             f'not {interpolation!r}')
        super().__init__(*args, interpolation=interpolation, backend=backend, **kwargs)

    def transform(self, results):
        img = results['img']
        y, x, h, w = self.rand_crop_params(img)
        crop = img[y:y + h, x:x + w]
        if self.backend == 'torch':
            # [None] first: torch tells from the strides that the channels are last, and keeps it.
            crop_1CHW = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
            out_1CHW = torch.nn.functional.interpolate(
                crop_1CHW, tuple(self.scale), mode=self.interpolation, antialias=True)
            img = np.ascontiguousarray(out_1CHW[0].permute(1, 2, 0).numpy())
        else:  # a copy, because Pillow is slow to read a view
            img = mmcv.imresize(np.ascontiguousarray(crop), tuple(self.scale[::-1]),
                                interpolation=self.interpolation, backend=self.backend)
        results['img'] = img
        results['img_shape'] = img.shape
        return results


@TRANSFORMS.register_module()
class RandomFlip(MMCVRandomFlip):
    """Stock; the image of a horizontal flip is an array of its own, not a view read backwards."""

    @cache_randomness
    def _choose_direction(self):
        if not (isinstance(self.direction, str) and isinstance(self.prob, float)):
            return super()._choose_direction()
        # One draw, which np.random.choice would compare with the same number at ten times the cost.
        return self.direction if np.random.random_sample() < self.prob else None

    def _flip(self, results):
        super()._flip(results)
        if results['flip_direction'] == 'horizontal':
            # Undo the view, which costs nothing, and let cv2 do what each later step would.
            results['img'] = cv2.flip(results['img'][:, ::-1], 1)


# --- RandAugment ----------------------------------------------------------------------------

@TRANSFORMS.register_module()
class AutoContrast(stock.AutoContrast):
    """mmcv.auto_contrast depends on the smallest and largest value of a channel alone: it is run
    on 256 values with the same two, and cv2 looks the image up."""

    def transform(self, results):
        if not self.random_disable():
            img = results['img']
            channels = cv2.split(img)
            ramp = np.clip(RAMP, np.array([c.min() for c in channels]),
                           np.array([c.max() for c in channels]))
            results['img'] = cv2.LUT(img, mmcv.auto_contrast(ramp))
        return results


@TRANSFORMS.register_module()
class Equalize(stock.Equalize):
    """mmcv.imequalize with its histogram counted by cv2 and its table applied by cv2."""

    def transform(self, results):
        if not self.random_disable():
            img = results['img']
            table = np.stack([self.table(img, c) for c in range(3)], axis=-1)[None]
            results['img'] = cv2.LUT(img, table)
        return results

    @staticmethod
    def table(img, channel):
        histo = cv2.calcHist([img], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (histo.sum() - histo[histo > 0][-1]) // 255
        if not step:
            return RAMP[0, :, 0]
        table = np.zeros(256, np.uint8)
        table[1:] = np.minimum((np.cumsum(histo)[:-1] + step // 2) // step, 255)
        return table


@TRANSFORMS.register_module()
class Contrast(stock.Contrast):
    """mmcv.adjust_contrast: its mean over the image, the rest on 256 values."""

    def transform(self, results):
        if self.random_disable():
            return results
        magnitude = self.random_magnitude() if self.magnitude is None else self.magnitude
        factor = 1 + self.random_negative(magnitude)
        img = results['img']
        gray = cv2.cvtColor(img, cv2.COLOR_BGR2GRAY)
        mean = np.full_like(RAMP[..., 0], round(gray.sum() / gray.size))
        table = cv2.addWeighted(RAMP[..., 0].astype(np.float32), factor,
                                mean.astype(np.float32), 1 - factor, 0)
        results['img'] = cv2.LUT(img, np.clip(table, 0, 255).astype(np.uint8))
        return results


# Of the others, rotation, shear and translation cost the most (half a millisecond for 224x224),
# all of it inside cv2.warpAffine.
FASTER = {t.__name__: t for t in (AutoContrast, Equalize, Contrast)}


def _is_stock(policy):
    """Whether a policy names one of mmpretrain's three operations, in whichever way."""
    return type_name(policy) in FASTER and \
        next(scopes_of(policy), 'mmpretrain') in ('mmpretrain', 'mmcls')


@TRANSFORMS.register_module()
class RandAugment(stock.RandAugment):
    """Stock, with the three operations above where the policies name mmpretrain's.

    Raises ValueError for a name that is no preset of policies.
    """

    def __init__(self, policies, *args, **kwargs):
        if isinstance(policies, str):
            if policies not in RANDAUG_POLICIES:
                raise ValueError(f'policies must be a list or one of {sorted(RANDAUG_POLICIES)}, '
                                 f'not {policies!r}')
            policies = RANDAUG_POLICIES[policies]
        policies = [dict(p, type=f'vmamba_mm.{type_name(p)}') if _is_stock(p) else p
                    for p in policies]
        super().__init__(policies, *args, **kwargs)

    def transform(self, results):
        for i in self.random_policy_indices():
            results = self.transforms[i](results)
        return results


# --- after it -------------------------------------------------------------------------------

@TRANSFORMS.register_module()
class RandomErasing(stock.RandomErasing):
    """Stock; the normal noise of ``mode='rand'`` with ``fill_std`` comes from torch's generator.

    The distribution is the same; its numbers are not, and are fp32 before they are cut to uint8.
    """

    def _fill_pixels(self, img, top, left, h, w):
        if self.mode != 'rand' or self.fill_std is None:
            return super()._fill_pixels(img, top, left, h, w)
        noise = torch.empty(h, w, 3).normal_()
        noise.mul_(torch.tensor(self.fill_std)).add_(torch.tensor(self.fill_color))
        img[top:top + h, left:left + w] = noise.clamp_(0, 255).to(torch.uint8).numpy()
        return img


@TRANSFORMS.register_module()
class PackInputs(stock.PackInputs):
    """Stock; cv2 takes the channels of a uint8 colour image apart."""

    @staticmethod
    def format_input(input_):
        if not (isinstance(input_, np.ndarray) and input_.dtype == np.uint8
                and input_.shape[2:] == (3, )):
            return stock.PackInputs.format_input(input_)
        out_CHW = torch.empty((3, *input_.shape[:2]), dtype=torch.uint8)
        cv2.split(input_, list(out_CHW.numpy()))
        return out_CHW
