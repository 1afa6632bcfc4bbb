"""Transforms of pairs of images and of masks of one class, for mmseg's pipelines."""

from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmengine import fileio

from vmamba_mm.errors import UserError
from vmamba_mm.registry import TRANSFORMS


def _load(path: str, **options) -> np.ndarray:
    """The image in a file; ``options`` are those of mmcv's ``imfrombytes``."""
    try:
        content = fileio.get(path)
    except OSError as err:
        raise UserError(f'the image {path} cannot be read: {err.strerror}') from err
    try:
        image = mmcv.imfrombytes(content, **options)
    except Exception:  # whatever a decoder says to it
        image = None
    if image is None:
        raise UserError(f'the image {path} is corrupt, or no image; delete it or replace it with a '
                        'sound copy')
    return image


@TRANSFORMS.register_module()
class LoadImagePair(BaseTransform):
    """Loads the two images of a pair, as mmseg's ``LoadMultipleRSImageFromFile`` without GDAL.

    Keys: ``img_path`` and ``img_path2``, to ``img`` and ``img2``, (H, W, 3) uint8 in RGB, and their
    size, ``img_shape`` and ``ori_shape``.

    Args:
        imdecode_backend: as of mmcv's ``LoadImageFromFile``.

    Raises:
        UserError: on a pair of which a file is missing, or is no image, or that differs in size.
    """

    def __init__(self, imdecode_backend: str = 'cv2'):
        self.imdecode_backend = imdecode_backend

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        paths = [results.get(key) for key in ('img_path', 'img_path2')]
        if None in paths:
            raise UserError(f'the model finds changes between two images, and there is only '
                            f'{paths[0] or paths[1]}: give the second one as well')
        first, second = (_load(path, flag='color', channel_order='rgb',
                               backend=self.imdecode_backend) for path in paths)
        if first.shape != second.shape:
            sizes = [f'{image.shape[1]}x{image.shape[0]}' for image in (first, second)]
            raise UserError(f'the two images of a pair must have one size: {paths[0]} has '
                            f'{sizes[0]} pixels and {paths[1]} {sizes[1]}; bring them to the same '
                            'pixels of the ground first')
        return dict(results, img=first, img2=second, img_shape=first.shape[:2],
                    ori_shape=first.shape[:2])


@TRANSFORMS.register_module()
class LoadBinaryAnnotations(BaseTransform):
    """Loads a mask of one class, whose number becomes 1.

    Black and white masks have it as 255, which is what mmseg leaves out of loss and metrics.

    Keys: ``seg_map_path``, to ``gt_seg_map``, (H, W) uint8 of 0 and 1, as mmseg's
    ``LoadAnnotations``; before or after a transform that resizes the image alone.

    Args:
        threshold: values from this on are the class, in any channel but alpha. 128 leaves out what
            compression or resizing made of black. A mask without values above 1 has the numbers
            already.

    Raises:
        UserError: on a file that cannot be read or is no image, or has not the size of the image.
    """

    def __init__(self, threshold: int = 1):
        if not 1 <= threshold <= 255:
            raise ValueError(f'threshold must be from 1 to 255, got {threshold!r}')
        self.threshold = threshold

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        mask = _load(results['seg_map_path'], flag='unchanged', backend='pillow')
        if mask.ndim == 3:
            alpha = mask.shape[2] in (2, 4)
            mask = mask[..., :mask.shape[2] - alpha].max(-1)
        mask = mask >= (self.threshold if mask.max(initial=0) > 1 else 1)
        size = results.get('ori_shape', mask.shape)
        if mask.shape != size:
            sizes = [f'{width}x{height}' for height, width in (mask.shape, size)]
            raise UserError(f'the mask {results["seg_map_path"]} has {sizes[0]} pixels and its '
                            f'image {results["img_path"]} {sizes[1]}; they must have one size')
        fields = [*results.get('seg_fields', ()), 'gt_seg_map']
        return dict(results, gt_seg_map=mask.astype(np.uint8), seg_fields=fields)


class _Sometimes(BaseTransform):
    """Changes a sample, or leaves it."""

    def __init__(self, prob: float = 0.5):
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be from 0 to 1, got {prob!r}')
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if self._draw() < self.prob:
            self.change(results)
        return results

    @cache_randomness
    def _draw(self):
        return np.random.rand()


@TRANSFORMS.register_module()
class SwapImages(_Sometimes):
    """Exchanges ``img`` and ``img2``: a change is one in either direction of time.

    Args:
        prob: how often.
    """

    def change(self, results: dict[str, Any]) -> None:
        results['img'], results['img2'] = results['img2'], results['img']


@TRANSFORMS.register_module()
class RandomTranspose(_Sometimes):
    """Exchanges rows and columns of the image and of its mask.

    Args:
        prob: how often.
    """

    def change(self, results: dict[str, Any]) -> None:
        for key in ('img', *results.get('seg_fields', ())):
            results[key] = np.ascontiguousarray(np.swapaxes(results[key], 0, 1))
        results['img_shape'] = results['img'].shape[:2]
