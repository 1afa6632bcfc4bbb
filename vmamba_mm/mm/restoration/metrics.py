"""PSNR and SSIM as published tables of image restoration have them.

Images are compared as 8-bit, without a border of pixels, in colour or on their luma: BT.601 of
studio range, not rounded. SSIM is that of Wang et al. (2004) as in MATLAB, a Gaussian window of
11x11 pixels with sigma 1.5 where all of it lies in the image. Packages differ: torchmetrics by up
to 0.015 in SSIM at the borders of small images, pyiqa by up to 0.0007 on the luma.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.registry import METRICS

#: Of R, G and B of [0, 255] in the luma, whose offset is 16.
_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_WINDOW, _SIGMA = 11, 1.5


def to_8_bit(image: Tensor) -> Tensor:
    """Values of [0, 1], clipped and rounded to integers of [0, 255], as fp64."""
    return image.double().clamp(0, 1).mul(255).round()


def luma(rgb: Tensor) -> Tensor:
    """(..., 3, H, W) of [0, 255] -> (..., 1, H, W) of [16, 235], fp64."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=rgb.device)
    return (rgb.double() * weights.view(3, 1, 1)).sum(-3, keepdim=True) + 16


def crop(image: Tensor, border: int) -> Tensor:
    """An image (..., H, W) without ``border`` pixels at each side.

    Raises:
        ValueError: if nothing would be left.
    """
    height, width = image.shape[-2:]
    if border and min(height, width) <= 2 * border:
        raise ValueError(f'an image of {height}x{width} has nothing left without {border} pixels '
                         'at each side')
    return image[..., border:height - border, border:width - border]


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images (C, H, W) of [0, 255]; inf if they are equal.
    """
    error = (image.double() - target.double()).square().mean().item()
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


def ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity of two images (C, H, W) of [0, 255], the mean over channels.

    Raises:
        ValueError: if an image is smaller than the window.
    """
    if min(image.shape[-2:]) < _WINDOW:
        raise ValueError(f'SSIM needs images of at least {_WINDOW}x{_WINDOW} pixels, got '
                         f'{tuple(image.shape[-2:])}')
    place = torch.arange(_WINDOW, dtype=torch.float64, device=image.device) - _WINDOW // 2
    window = torch.exp(-place.square() / (2 * _SIGMA ** 2))
    window /= window.sum()

    def blur(x):
        x = F.conv2d(x, window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1))

    x, y = (t.double()[:, None] for t in (image, target))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2
    covariance = blur(x * y) - mean_x * mean_y
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / (
        (mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return found.mean().item()


def compare(image: Tensor, target: Tensor, crop_border: int = 0, on_luma: bool = False
            ) -> tuple[float, float]:
    """PSNR and SSIM of two images.

    Args:
        image, target: (C, H, W) in RGB or grey, of [0, 255].
        crop_border: pixels at each side that do not count, of super-resolution its scale.
        on_luma: compare the luma of colour images; a grey one is taken as it is.

    Raises:
        ValueError: on images of different shapes, or smaller than the window of SSIM.
    """
    if image.shape != target.shape:
        raise ValueError(f'images of {tuple(image.shape)} and {tuple(target.shape)} cannot be '
                         'compared')
    image, target = crop(image, crop_border), crop(target, crop_border)
    if on_luma and image.shape[0] == 3:
        image, target = luma(image), luma(target)
    return psnr(image, target), ssim(image, target)


def compare_bgr(image: Tensor, target: Tensor, crop_border: int = 0, on_luma: bool = False
                ) -> tuple[float, float]:
    """The same for images (H, W, C) in OpenCV's order of channels, as BasicSR has them."""
    image, target = (t.flip(-1).movedim(-1, 0) for t in (image, target))
    return compare(image, target, crop_border, on_luma)


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """PSNR in dB and SSIM of restored images, the mean of all, as published tables have them.

    A sample has ``pred`` and ``gt``, (C, H, W) of [0, 1]. Results: ``psnr`` and ``ssim``.

    Args:
        crop_border: pixels at each side that do not count, of super-resolution its scale.
        on_luma: compare the luma of colour images.
        collect_device, prefix: mmengine's.

    Raises:
        UserError: on an image that is too small, or not of the size of the good one.
    """

    def __init__(self, crop_border: int = 0, on_luma: bool = False, collect_device: str = 'cpu',
                 prefix: str | None = None):
        super().__init__(collect_device, prefix)
        if not isinstance(crop_border, int) or crop_border < 0:
            raise ValueError(f'crop_border must be an int of at least 0, got {crop_border!r}')
        self.crop_border, self.on_luma = crop_border, on_luma

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            images = (to_8_bit(sample[key].cpu()) for key in ('pred', 'gt'))
            try:
                self.results.append(compare(*images, self.crop_border, self.on_luma))
            except ValueError as err:
                raise UserError(f'{sample.get("gt_path", "an image")} cannot be measured: {err}; '
                                'leave it out of the test') from err

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        return {name: sum(result[i] for result in results) / len(results)
                for i, name in enumerate(('psnr', 'ssim'))}
