"""Feature pyramids of a backbone whose maps have one size."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers import LayerNorm2d
from vmamba_mm.registry import MODELS

MODELS.register_module(name='LayerNorm2d', module=LayerNorm2d)  # for heads, as norm_cfg
#: Scale -> number of the level, whose stride is 2 to that power, of a map of stride 16.
_LEVELS = {4.0: 2, 2.0: 3, 1.0: 4, 0.5: 5}


@MODELS.register_module()
class SimpleFeaturePyramid(nn.Module):
    """The pyramid of ViTDet (arXiv 2203.16527, section 3): maps of strides 4 to 64 from one map.

    The map goes through transposed convolutions to four and two times its size, stays as it is, and
    is pooled to half of it; then through a 1x1 and a 3x3 convolution, each with a LayerNorm of the
    channels. Every second position of the smallest is the last level. Names of weights are those of
    detectron2's class of this name.

    Args:
        in_channels: of the map.
        out_channels: of every level.

    Shape:
        (B, in_channels, H, W), or a sequence whose last element is that, to a tuple of five maps
        (B, out_channels, h, w), with h of 4H, 2H, H, H // 2 and ceil((H // 2) / 2).

    Raises:
        ValueError: if ``in_channels`` is no multiple of 4.
    """

    def __init__(self, in_channels: int, out_channels: int = 256):
        super().__init__()
        if in_channels < 4 or in_channels % 4:
            raise ValueError(f'in_channels must be a multiple of 4, got {in_channels}')
        dims = in_channels
        steps = {
            4.0: (nn.ConvTranspose2d(dims, dims // 2, 2, 2), _norm(dims // 2), nn.GELU(),
                  nn.ConvTranspose2d(dims // 2, dims // 4, 2, 2)),
            2.0: (nn.ConvTranspose2d(dims, dims // 2, 2, 2),),
            1.0: (), 0.5: (nn.MaxPool2d(2, 2),)}
        for scale, level in _LEVELS.items():
            width = dims // int(max(scale, 1))
            self.add_module(f'simfp_{level}', nn.Sequential(
                *steps[scale], ConvNorm(width, out_channels, 1),
                ConvNorm(out_channels, out_channels, 3)))

    def forward(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        x = x if isinstance(x, Tensor) else x[-1]
        maps = [getattr(self, f'simfp_{level}')(x).contiguous() for level in _LEVELS.values()]
        return *maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)


class ConvNorm(nn.Conv2d):
    """A convolution that keeps the size, without a bias, and a LayerNorm of the channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2,
                         bias=False)
        self.norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def _norm(dims: int) -> LayerNorm2d:
    return LayerNorm2d(dims, eps=1e-6)
