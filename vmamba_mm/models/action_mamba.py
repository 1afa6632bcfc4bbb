"""ActionMamba, the feature pyramid over time of Video Mamba Suite (arXiv 2403.09626, section 4.1).

It is ActionFormer's backbone (arXiv 2202.07925, section 3.2) with Mamba mixers in place of local
attention. Sequences are features of a video encoder, one for some frames each, padded to a common
length; a mask says which positions are real. ActionFormer's heads for temporal action localization
take what it returns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.layers import BiMambaMixer, DecomposedBiMambaMixer, DropPath
from vmamba_mm.registry import MODELS


class MaskedConv1d(nn.Module):
    """A convolution over time whose result is zero where the mask is.

    Args:
        in_channels, out_channels: of the features.
        kernel_size: odd; the length of the sequence stays.
        bias: of the convolution.

    Shape: x (B, in_channels, T) and mask (B, 1, T), bool -> (B, out_channels, T) and the mask.

    Raises:
        ValueError: if ``kernel_size`` is even.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3,
                 bias: bool = True):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2,
                              bias=bias)
        if bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x) * mask.to(x.dtype), mask


class LayerNorm1d(nn.Module):
    """LayerNorm over the channels of (B, C, T), with a weight and a bias of (1, C, 1)."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 2), x.shape[1:2], self.weight.flatten(),
                            self.bias.flatten(), self.eps).transpose(1, 2)


class AffineDropPath(DropPath):
    """:class:`DropPath` of a branch that is scaled first, by a factor for each channel.

    The factors start small, so that deep stacks train (LayerScale, arXiv 2103.17239).

    Shape: (B, C, T) -> (B, C, T).
    """

    def __init__(self, channels: int, drop_prob: float = 0.0, init_value: float = 1e-4):
        super().__init__(drop_prob)
        self.scale = nn.Parameter(torch.full((1, channels, 1), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale * x)


class MaskedMaxPool(nn.Module):
    """Halves a sequence: the maximum of three neighbours, zero where the mask is.

    Of a mask every second position stays, the first one among them.

    Shape: x (B, C, T) and mask (B, 1, T), T even -> (B, C, T / 2) and (B, 1, T / 2).

    Raises:
        ValueError: if T is odd.
    """

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] % 2:
            raise ValueError(f'a sequence of {x.shape[-1]} positions cannot be halved: pad it to '
                             'a multiple of 2 for each level of the pyramid')
        mask = mask[..., ::2]
        return F.max_pool1d(x, 3, stride=2, padding=1) * mask.to(x.dtype), mask


class MaskMambaBlock(nn.Module):
    """x + drop_path(scale * mask * mixer(norm(x))), then pooling if ``stride`` is 2.

    The mask is of the branch's result alone: what lies under it, zeros or not, enters the scan of
    the backward direction. This is how the published models were trained.

    Args:
        embed_dims: C.
        stride: 1, or 2 to halve the sequence at the end.
        mixer: 'dbm' for :class:`DecomposedBiMambaMixer`, which has C inner channels for each
            direction, or 'vim' for :class:`BiMambaMixer`, which has 2C and adds the directions.
        d_conv: width of the mixer's convolutions.
        drop_path: probability to drop the branch of a sample. With 0 the branch has no ``scale``,
            as in the official code.

    Shape: x (B, C, T) and mask (B, 1, T), bool -> the same, or with T / 2 positions.

    Raises:
        ValueError: on a value that is not allowed, or an odd T with stride 2.
    """

    def __init__(self, embed_dims: int, stride: int = 1, mixer: str = 'dbm', d_conv: int = 4,
                 drop_path: float = 0.3):
        super().__init__()
        if mixer not in ('dbm', 'vim'):
            raise ValueError(f"mixer={mixer!r} does not exist; choose 'dbm' or 'vim'")
        if stride not in (1, 2):
            raise ValueError(f'stride must be 1 or 2, got {stride!r}')
        self.mamba = DecomposedBiMambaMixer(embed_dims, d_conv=d_conv, expand=1) \
            if mixer == 'dbm' else BiMambaMixer(embed_dims, d_conv=d_conv)
        self.downsample = MaskedMaxPool() if stride == 2 else None
        self.norm = nn.LayerNorm(embed_dims)
        self.drop_path = AffineDropPath(embed_dims, drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mamba(self.norm(x.transpose(1, 2))).transpose(1, 2)
        x = x + self.drop_path(y * mask.to(y.dtype))
        return (x, mask) if self.downsample is None else self.downsample(x, mask)


@MODELS.register_module()
class ActionMamba(BaseModule):
    """A pyramid of features over time, for heads of temporal action localization.

    Convolutions with norms and ReLU embed the features; blocks of one length follow, and then
    blocks that halve the sequence, each of which is a level of the pyramid.

    Args:
        in_channels: of the features, such as 3200 of InternVideo's two encoders.
        embed_dims: C.
        depths: numbers of convolutions, of blocks before the pyramid, and of levels that halve the
            sequence.
        kernel_size: of the convolutions, odd.
        conv_norm: whether they have norms, in place of biases.
        mixer, drop_path: as of :class:`MaskMambaBlock`.
        init_cfg: mmengine's.

    Shape:
        x (B, in_channels, T) and mask (B, 1, T), bool, true where a position is real, to
        (features, masks): ``1 + depths[2]`` levels each, (B, C, T / 2^i) and (B, 1, T / 2^i).
        T must be a multiple of 2^depths[2].

    Raises:
        ValueError: on a value that is not allowed, or a length that cannot be halved so often.
    """

    def __init__(self, in_channels: int, embed_dims: int = 512,
                 depths: Sequence[int] = (2, 2, 5), kernel_size: int = 3, conv_norm: bool = True,
                 mixer: str = 'dbm', drop_path: float = 0.3,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        if len(depths) != 3 or any(not isinstance(n, int) or n < 0 for n in depths):
            raise ValueError('depths must be 3 ints of at least 0 (convolutions, blocks, levels), '
                             f'got {depths!r}')
        convs, blocks, levels = depths
        self.depths = tuple(depths)
        self.embd = nn.ModuleList(
            MaskedConv1d(embed_dims if i else in_channels, embed_dims, kernel_size,
                         bias=not conv_norm) for i in range(convs))
        self.embd_norm = nn.ModuleList(LayerNorm1d(embed_dims) if conv_norm else nn.Identity()
                                       for _ in range(convs))
        self.stem = nn.ModuleList(MaskMambaBlock(embed_dims, 1, mixer, drop_path=drop_path)
                                  for _ in range(blocks))
        self.branch = nn.ModuleList(MaskMambaBlock(embed_dims, 2, mixer, drop_path=drop_path)
                                    for _ in range(levels))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if mask.dtype != torch.bool or mask.shape != (x.shape[0], 1, x.shape[2]):
            raise ValueError(f'mask must be of bool and {(x.shape[0], 1, x.shape[2])}, got '
                             f'{mask.dtype} and {tuple(mask.shape)}')
        for conv, norm in zip(self.embd, self.embd_norm, strict=True):
            x, mask = conv(x, mask)
            x = F.relu(norm(x))
        for block in self.stem:
            x, mask = block(x, mask)
        features, masks = [x], [mask]
        for block in self.branch:
            x, mask = block(x, mask)
            features.append(x)
            masks.append(mask)
        return tuple(features), tuple(masks)
