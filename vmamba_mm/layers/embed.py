"""Stems and downsamplings. Maps between them are channels last: (B, H, W, C)."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import is_plain, is_plain_conv
from vmamba_mm.layers.positions import pad_to_a_patch, pad_to_strides
from vmamba_mm.ops import channels_last, conv_norm, conv_norm_gelu, expand_norm, merge_norm
from vmamba_mm.ops.fused.patch_norm.reference import expand, merge

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('channels_last')
torch.fx.wrap('conv_norm')
torch.fx.wrap('conv_norm_gelu')
torch.fx.wrap('expand_norm')
torch.fx.wrap('merge_norm')
torch.fx.wrap('pad_to_a_patch')
torch.fx.wrap('pad_to_strides')


def _conv_norm(conv: nn.Conv2d, norm: LayerNorm, x_BHWC: Tensor) -> Tensor:
    """A convolution and the norm that follows it, on channels-last maps."""
    if is_plain_conv(conv) and is_plain(norm, LayerNorm):
        return conv_norm(x_BHWC, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps,
                         stride=conv.stride[0], padding=conv.padding[0],
                         out_dtype=norm.out_dtype(x_BHWC))
    return norm(conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """Non-overlapping 4x4 patches (vanilla VMamba): (B, in_channels, H, W) -> (B, H/4, W/4, C).

    Like the published model it leaves out the last H % 4 rows and W % 4 columns; a side below 4
    is padded with zeros to one patch.
    """

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, kernel_size=4, stride=4)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        return _conv_norm(self.proj, self.norm, channels_last(pad_to_a_patch(x, 4)))


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a norm: (B, in_channels, H, W) ->
    (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, embed_dims // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = LayerNorm(embed_dims // 2, feeds_matmul=True)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dims // 2, embed_dims, kernel_size=3, stride=2, padding=1)
        self.norm2 = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv1, self.norm1
        if (is_plain_conv(conv) and (conv.kernel_size, conv.stride, conv.padding)
                == ((3, 3), (2, 2), (1, 1)) and is_plain(norm, LayerNorm)
                and is_plain(self.act, nn.GELU) and self.act.approximate == 'none'):
            x = conv_norm_gelu(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        else:
            x = self.act(_conv_norm(conv, norm, channels_last(x)))
        return _conv_norm(self.conv2, self.norm2, x)


class MergeDownsample(nn.Module):
    """Swin's patch merging (vanilla VMamba): (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C).

    Args:
        dim: C.
        out_dim: another number of channels than 2C.
        odd: of a side of odd length, 'pad' it with zeros, or 'crop' the last row or column.

    Raises:
        ValueError: on another ``odd``.
    """

    def __init__(self, dim: int, out_dim: int | None = None, odd: str = 'pad'):
        super().__init__()
        if odd not in ('pad', 'crop'):
            raise ValueError(f"odd={odd!r} does not exist; choose 'pad' or 'crop'")
        self.odd = odd
        self.norm = LayerNorm(4 * dim, feeds_matmul=True)
        self.reduction = nn.Linear(4 * dim, out_dim or 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.odd == 'pad':
            height, width = x.shape[1:3]
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        norm = self.norm
        if is_plain(norm, LayerNorm):
            x = merge_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=norm.out_dtype(x))
        else:
            x = norm(merge(x))
        return self.reduction(x)


class PatchExpand(nn.Module):
    """Swin-Unet's patch expanding (arXiv 2105.05537, section 3.5): (B, H, W, C) ->
    (B, f * H, f * W, C / f), the inverse of patch merging.

    Args:
        dim: C. C / f is rounded down, but at least 1.
        factor: f.
    """

    def __init__(self, dim: int, factor: int = 2):
        super().__init__()
        out_dim = max(1, dim // factor)
        self.factor = factor
        self.expand = nn.Linear(dim, factor ** 2 * out_dim, bias=False)
        self.norm = LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.expand(x)
        if is_plain(norm, LayerNorm):
            return expand_norm(x, norm.weight, norm.bias, self.factor, norm.eps,
                               out_dtype=norm.out_dtype(x))
        return norm(expand(x, self.factor))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and a norm: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C).

    Args:
        dim: C.
        out_dim: another number of channels than 2C.
    """

    def __init__(self, dim: int, out_dim: int | None = None):
        super().__init__()
        out_dim = out_dim or 2 * dim
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1)
        self.norm = LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return _conv_norm(self.conv, self.norm, x)


class PatchEmbed(nn.Module):
    """Patches of a side, which may overlap (ViT): (B, in_channels, H, W) -> (B, h, w, C).

    Sides smaller than a patch are padded with zeros, and what is left over is ignored.

    Args:
        in_channels: channels of the input.
        embed_dims: C.
        patch_size: pixels of a side.
        stride: pixels from one patch to the next; None for ``patch_size``.
        bias: of the projection.
        ceil_mode: a patch begins at every ``stride`` pixels, h = ceil(H / stride), with zeros where
            it reaches over the lower or the right border, so that nothing is ignored.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int,
                 stride: int | None = None, bias: bool = True, ceil_mode: bool = False):
        super().__init__()
        self.ceil_mode = ceil_mode
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride or patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        patch_size, stride = self.proj.kernel_size[0], self.proj.stride[0]
        x = pad_to_strides(x, patch_size, stride) if self.ceil_mode \
            else pad_to_a_patch(x, patch_size)
        return self.proj(x).permute(0, 2, 3, 1)
