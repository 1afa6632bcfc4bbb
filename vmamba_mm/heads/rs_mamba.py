"""The decoder of RS-Mamba (arXiv 2404.02668), the fusion of two dates, and whole models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.models import RemoteSensingMamba
from vmamba_mm.registry import MODELS


class ConvBatchNorm(nn.Module):
    """A convolution that keeps the size, batch norm and ReLU, on maps (B, C, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2,
                              bias=bias)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@MODELS.register_module()
class ChannelFusion(nn.Module):
    """Fuses the maps of several images at each scale: 1x1 convolution, batch norm, ReLU.

    Args:
        in_channels: of each scale, of one image.
        num_images: whose channels lie one behind the other in a map.

    Shape: a sequence of (B, num_images * C_i, H_i, W_i) to a tuple of (B, C_i, H_i, W_i).
    """

    def __init__(self, in_channels: Sequence[int], num_images: int = 2):
        super().__init__()
        self.fuse = nn.ModuleList(ConvBatchNorm(num_images * c, c, 1, bias=False)
                                  for c in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(fuse(x) for fuse, x in zip(self.fuse, maps, strict=True))


class ConcatDecoder(nn.Module):
    """RS-Mamba's decoder: from the deepest map on, twice the size, the next map beside it, 1x1
    convolution; at the end four times the size.

    Args:
        in_channels: C_i of the maps, from the largest on; C_0 must be even.
        out_channels: of the logits.

    Shape: a sequence of (B, C_i, H / 2^i, W / 2^i), each ceil of the one before, to logits
    (B, out_channels, 4H, 4W).

    Raises:
        ValueError: on fewer than two maps.
    """

    channels = 8  #: before the last convolution

    def __init__(self, in_channels: Sequence[int], out_channels: int = 1):
        super().__init__()
        if len(in_channels) < 2:
            raise ValueError(f'in_channels must be those of at least two maps, got {in_channels!r}')
        first = in_channels[0]
        self.blocks = nn.ModuleList(
            ConvBatchNorm(skip + deep, skip, 1, bias=False)
            for skip, deep in zip(in_channels[:-1], in_channels[1:], strict=True))
        self.up1 = ConvBatchNorm(first, first // 2, 3, bias=True)
        self.up2 = ConvBatchNorm(first // 2, self.channels, 3, bias=True)
        self.conv_out = nn.Conv2d(self.channels, out_channels, 7, padding=3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for block, skip in zip(reversed(self.blocks), reversed(skips), strict=True):
            # To the size of the next map, which is not quite twice this one of odd images.
            x = block(torch.cat((F.interpolate(x, size=skip.shape[2:]), skip), dim=1))
        for up in (self.up1, self.up2):
            x = F.interpolate(up(x), scale_factor=2, mode='bilinear', align_corners=True)
        return self.conv_out(x)


class RemoteSensingModel(nn.Module):
    """RSM-SS, or with ``num_images=2`` RSM-CD, in plain PyTorch: logits of images.

    Parts and weights are called as in mmseg's segmentor of the configs, so that either loads what
    the other has trained; official files load as well.

    Args:
        arch, drop_path_rate, in_channels, num_images: as of
            :class:`vmamba_mm.models.RemoteSensingMamba`.
        out_channels: of the logits.

    Shape: (B, num_images * in_channels, H, W) to logits (B, out_channels, H', W'), H' the next
    multiple of 4.
    """

    def __init__(self, arch: str | Mapping[str, Any] | None = None, num_images: int = 1,
                 in_channels: int = 3, drop_path_rate: float = 0.0, out_channels: int = 1):
        super().__init__()
        self.backbone = RemoteSensingMamba(arch, num_images=num_images, in_channels=in_channels,
                                           drop_path_rate=drop_path_rate)
        dims = self.backbone.num_features
        self.neck = ChannelFusion(dims, num_images) if num_images > 1 else nn.Identity()
        self.decode_head = nn.Sequential()
        self.decode_head.add_module('decoder', ConcatDecoder(dims, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.neck(self.backbone(x)))

    def forward_images(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The same of an image, or of a sequence of ``num_images``, each (B, C, H, W)."""
        return self(images if isinstance(images, Tensor) else torch.cat(tuple(images), dim=1))
