"""Steps of pipelines of restoration. Images are (H, W, C) fp32 in RGB or grey, of [0, 1]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from vmamba_mm.errors import UserError
from vmamba_mm.mm.restoration.images import opencv, read_image, resize
from vmamba_mm.registry import TRANSFORMS

COLOURS = ('rgb', 'grey')
#: Of R, G and B in the grey of OpenCV.
_GREY = np.float32([0.299, 0.587, 0.114])


@TRANSFORMS.register_module()
class LoadPair:
    """Read ``gt_path`` and ``lq_path`` as ``gt`` and ``lq``, whichever of them there is.

    Args:
        colour: 'rgb', or 'grey' (BT.601 of full range) for models of one channel; other images are
            brought to it.
        scale: how many times as large the good image is. What is beyond a multiple of it, at the
            right and below, is cut off, as where it was degraded.

    Raises:
        ValueError: on a value that is not allowed.
        UserError: on a file that cannot be read, or a pair that does not fit together.
    """

    def __init__(self, colour: str = 'rgb', scale: int = 1):
        if colour not in COLOURS:
            raise ValueError(f'colour={colour!r} does not exist; choose one of {COLOURS}')
        self.colour, self.scale = colour, _check_scale(scale)

    def __call__(self, results: dict) -> dict:
        results = dict(results)
        for key in ('gt', 'lq'):
            if results.get(f'{key}_path'):
                results[key] = self._read(results[f'{key}_path'])
        scale = self.scale
        if 'gt' in results:
            height, width = (side // scale * scale for side in results['gt'].shape[:2])
            if not height or not width:
                raise UserError(f'{results["gt_path"]} has {_size(results["gt"])} pixels, and is '
                                f'smaller than the scale, {scale}')
            results['gt'] = results['gt'][:height, :width]
        if 'gt' in results and 'lq' in results:
            wanted = tuple(side // scale for side in results['gt'].shape[:2])
            if results['lq'].shape[:2] != wanted:
                raise UserError(f'{results["lq_path"]} has {_size(results["lq"])} pixels, and '
                                f'{results["gt_path"]} {_size(results["gt"])}, which is not '
                                f'{scale} times as much')
        return results

    def _read(self, path):
        values = read_image(path).values
        if self.colour == 'grey' and values.shape[2] == 3:
            return values @ _GREY[:, None]
        return values.repeat(3, 2) if self.colour == 'rgb' and values.shape[2] == 1 else values


@TRANSFORMS.register_module()
class Downscale:
    """Make ``lq`` of ``gt`` by MATLAB's bicubic, 8 bits.

    Args:
        scale: by which sides are divided; they are multiples of it.
    """

    def __init__(self, scale: int):
        self.scale = _check_scale(scale)

    def __call__(self, results: dict) -> dict:
        gt = results['gt']
        size = [side // self.scale for side in gt.shape[:2]]
        return dict(results, lq=_to_8_bit(resize(gt, size)))


@TRANSFORMS.register_module()
class AddNoise:
    """Make ``lq`` of ``gt`` by normal noise, which is neither rounded nor clipped.

    Args:
        sigma: standard deviation, of values up to 255.
        seed: None for other noise each time; of a test a number, from which the noise of every
            image is drawn anew: with 0 it is that of the published numbers.
    """

    def __init__(self, sigma: float, seed: int | None = None):
        if not sigma >= 0:
            raise ValueError(f'sigma must be at least 0, got {sigma!r}')
        self.sigma, self.seed = sigma, seed

    def __call__(self, results: dict) -> dict:
        rng = np.random if self.seed is None else np.random.RandomState(self.seed)
        # The public code adds it to blue, green and red.
        noise = rng.normal(0, self.sigma / 255, results['gt'].shape)[..., ::-1]
        return dict(results, lq=(results['gt'] + noise).astype(np.float32))


@TRANSFORMS.register_module()
class CompressJPEG:
    """Make ``lq`` of ``gt`` by JPEG.

    Args:
        quality: from 1 to 100.
    """

    def __init__(self, quality: int):
        if not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f'quality must be an int from 1 to 100, got {quality!r}')
        self.quality = quality

    def __call__(self, results: dict) -> dict:
        cv2 = opencv()
        stored = np.ascontiguousarray((_to_8_bit(results['gt']) * 255).round()[..., ::-1])
        _, content = cv2.imencode('.jpg', stored.astype(np.uint8),
                                  [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        image = image[..., None] if image.ndim == 2 else image[..., ::-1]
        return dict(results, lq=image.astype(np.float32) / 255)


@TRANSFORMS.register_module()
class PatchOfPair:
    """A random patch of both images.

    Args:
        size: of a side of the good one, a multiple of ``scale``.
        scale: how many times as large the good image is.

    Raises:
        ValueError: on a value that is not allowed.
        UserError: on an image that is smaller.
    """

    def __init__(self, size: int, scale: int = 1):
        self.scale = _check_scale(scale)
        if not isinstance(size, int) or size < 1 or size % scale:
            raise ValueError(f'size must be a multiple of scale={scale}, got {size!r}')
        self.size = size

    def __call__(self, results: dict) -> dict:
        gt, scale, size = results['gt'], self.scale, self.size
        if min(gt.shape[:2]) < size:
            raise UserError(f'{results.get("gt_path", "an image")} has {_size(gt)} pixels, which '
                            f'is smaller than the patches of {size}: leave it out, or change size=')
        y, x = (np.random.randint((side - size) // scale + 1) for side in gt.shape[:2])
        results = dict(results, gt=gt[y * scale:y * scale + size, x * scale:x * scale + size])
        if 'lq' in results:
            results['lq'] = results['lq'][y:y + size // scale, x:x + size // scale]
        return results


@TRANSFORMS.register_module()
class TurnPair:
    """One of the eight poses of both images, each as likely: flipped, and transposed."""

    def __call__(self, results: dict) -> dict:
        across, down, transposed = (np.random.rand() < 0.5 for _ in range(3))

        def turn(image):
            image = image[:, ::-1] if across else image
            image = image[::-1] if down else image
            return image.transpose(1, 0, 2) if transposed else image

        return {k: turn(v) if k in ('gt', 'lq') else v for k, v in results.items()}


@TRANSFORMS.register_module()
class PackPair:
    """``inputs`` (C, h, w), the degraded image, and a sample with ``gt`` (C, H, W) if there is one.

    Args:
        meta_keys: what else the sample says.
    """

    def __init__(self, meta_keys: Sequence[str] = ('gt_path', 'lq_path')):
        self.meta_keys = tuple(meta_keys)

    def __call__(self, results: dict) -> dict[str, Any]:
        if 'lq' not in results:
            raise UserError(f'{results.get("gt_path", "an image")} has no degraded image: name '
                            'lq= of the data set, or add a step such as vmamba_mm.Downscale')
        sample = BaseDataElement(
            metainfo={k: results[k] for k in self.meta_keys if k in results})
        if 'gt' in results:
            sample.gt = _to_tensor(results['gt'])
        return dict(inputs=_to_tensor(results['lq']), data_samples=sample)


def _to_tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _to_8_bit(image):
    return ((image.astype(np.float64).clip(0, 1) * 255).round() / 255).astype(np.float32)


def _size(image):
    return f'{image.shape[1]}x{image.shape[0]}'


def _check_scale(scale):
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f'scale must be an int of at least 1, got {scale!r}')
    return scale
