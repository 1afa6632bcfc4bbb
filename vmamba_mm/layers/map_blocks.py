"""Stems, downsamplings and blocks of maps with depthwise convolutions beside a mixer: what RMT and
RAVLT share, and what VSSD and MILA do. Maps are channels last, (B, H, W, C)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.maps import ConvUnit, add_convolution
from vmamba_mm.layers.norm import LayerNorm, sum_and_norm
from vmamba_mm.layers.plain import are_plain, is_depthwise, is_plain
from vmamba_mm.layers.stage import Stage
from vmamba_mm.layers.vss_block import Mlp
from vmamba_mm.ops import add_norm, channels_last, conv_mlp
from vmamba_mm.ops.core.backends import runs_kernels
from vmamba_mm.ops.rotation import map_rotation_table

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('add_norm')
torch.fx.wrap('channels_last')
torch.fx.wrap('sum_and_norm')
torch.fx.wrap('turns_of_map')


# --- stems and downsamplings ----------------------------------------------------------------------

class GELUStem(nn.Module):
    """Four 3x3 convolutions with batch norms, two of which stride, and GELUs between them:
    (B, in_channels, H, W) -> (B, ceil(H/4), ceil(W/4), C).

    Args:
        in_channels: of images.
        channels, strides: of each convolution.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        first, second, third, last = channels
        self.conv1 = ConvUnit(in_channels, first, 3, strides[0], 1, act_layer=nn.GELU)
        self.conv2 = ConvUnit(first, second, 3, strides[1], 1, act_layer=nn.GELU)
        self.conv3 = ConvUnit(second, third, 3, strides[2], 1, act_layer=nn.GELU)
        self.conv4 = ConvUnit(third, last, 3, strides[3], 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv4(self.conv3(self.conv2(self.conv1(channels_last(x)))))


class ResidualStem(nn.Module):
    """Five convolutions, two of which stride and two of which are a residual branch:
    (B, in_channels, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        half = embed_dims // 2
        self.conv1 = ConvUnit(in_channels, half, 3, 2, 1, bias=False)
        self.conv2 = nn.Sequential(ConvUnit(half, half, 3, 1, 1, bias=False),
                                   ConvUnit(half, half, 3, 1, 1, bias=False, act=False))
        self.conv3 = nn.Sequential(ConvUnit(half, 4 * embed_dims, 3, 2, 1, bias=False),
                                   ConvUnit(4 * embed_dims, embed_dims, bias=False, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(channels_last(x))
        if is_plain(self.conv2, nn.Sequential) and is_plain(self.conv2[1], ConvUnit):
            x = self.conv2[1](self.conv2[0](x), x)
        else:
            x = x + self.conv2(x)
        return self.conv3(x)


class InvertedDownsample(nn.Module):
    """To 8C channels, a depthwise 3x3 convolution of stride 2, and to 2C with a batch norm:
    (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = 8 * dim
        self.conv = nn.Sequential(
            ConvUnit(dim, hidden, norm=False),
            ConvUnit(hidden, hidden, 3, 2, 1, groups=hidden, norm=False),
            ConvUnit(hidden, 2 * dim, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


# --- blocks ---------------------------------------------------------------------------------------

class ConvMlp(nn.Module):
    """Linear and GELU, a depthwise 3x3 convolution that is added, and Linear.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, conv, fc2 = self.fc1, self.dwconv, self.fc2
        if runs_kernels(x) and are_plain((fc1, fc2), (nn.Linear,) * 2) \
                and is_depthwise(conv, 3) and have_biases(fc1, conv, fc2):
            return conv_mlp(x, fc1.weight, fc1.bias, conv.weight, conv.bias, fc2.weight, fc2.bias)
        return fc2(add_convolution(conv, F.gelu(fc1(x))))


def have_biases(*modules: nn.Module) -> bool:
    """Not so if a user has put others in their place."""
    return all([module.bias is not None for module in modules])


class _Block(nn.Module):
    """What both kinds of block are called with.

    Args of ``forward``:
        x: (B, H, W, C).
        places: what the mixers of a stage want to know of the places of its pixels, such as a
            rotation, as the second argument of the mixer; None for mixers without.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    with_cp: bool

    def forward(self, x: Tensor, places: Any = None) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, places,
                                                     use_reentrant=False)
        return self._forward(x, places)


class CPEBlock(_Block):
    """Convolutional position encoding and a mixer, the same and an MLP; all are residual branches.

    Args:
        mixer: of maps, (B, H, W, C) -> (B, H, W, C).
        dim: C, channels.
        mlp_ratio: hidden width of the MLP by C.
        drop_path: probability to drop the mixer or the MLP.
        with_cp: recompute the block in the backward pass to save memory.
    """

    def __init__(self, mixer: nn.Module, dim: int, *, mlp_ratio: float, drop_path: float,
                 with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.cpe1, self.cpe2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.norm1, self.norm2 = (LayerNorm(dim, feeds_matmul=True) for _ in range(2))
        self.attn = mixer
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def _forward(self, x: Tensor, places: Any) -> Tensor:
        drop: Callable[[Tensor], Tensor] = self.drop_path
        scales: tuple[Tensor | None, ...] = (None, None)
        if is_plain(drop, DropPath):  # then the factors go into the sums
            scales, drop = drop.factors(x, 2), _identity
        x = add_convolution(self.cpe1, x)
        normed = self.norm1(x)
        branch = self.attn(normed) if places is None else self.attn(normed, places)
        x = add_convolution(self.cpe2, x, drop(branch), scales[0])
        return add_norm(x, drop(self.mlp(self.norm2(x))), None, None, scale=scales[1])[0]


class ScaledBlock(_Block):
    """A depthwise convolution, attention and a :class:`ConvMlp`; all are residual branches.

    Args:
        attention: of maps and their places, (B, H, W, C) -> (B, H, W, C).
        dim: C, channels.
        mlp_ratio: hidden width of the MLP by C.
        layer_scale: initial value of the factors of the last two branches; 0 for none.
        drop_path: probability to drop one of these two branches.
        with_cp: recompute the block in the backward pass to save memory.
    """

    def __init__(self, attention: nn.Module, dim: int, *, mlp_ratio: float, layer_scale: float,
                 drop_path: float, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (LayerNorm(dim, feeds_matmul=True, eps=1e-6) for _ in range(2))
        self.attn = attention
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        # Of four dimensions, as published: so they have weight decay, unlike biases.
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((1, 1, 1, dim), layer_scale)) if layer_scale else None
            for _ in range(2))

    def _forward(self, x: Tensor, places: Any) -> Tensor:
        drop: Callable[[Tensor], Tensor] = self.drop_path
        scales: tuple[Tensor | None, ...] = (None, None)
        if is_plain(drop, DropPath):  # then the factors go into the sums
            scales, drop = drop.factors(x, 2), _identity
            y = self._run_as_one_op(x, places, scales)
            if y is not None:
                return y
        x = add_convolution(self.pos, x)
        branch = drop(_scaled(self.attn(self.norm1(x), places), self.gamma_1))
        x, normed = sum_and_norm(self.norm2, x, branch, scales[0])
        branch = drop(_scaled(self.mlp(normed), self.gamma_2))
        return add_norm(x, branch, None, None, scale=scales[1])[0]

    def _run_as_one_op(self, x: Tensor, places: Any, scales: tuple[Tensor | None, ...]
                       ) -> Tensor | None:
        """The block by an op of its own, or None to go step by step."""
        return None


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


def _identity(branch: Tensor) -> Tensor:
    return branch


# --- stages ---------------------------------------------------------------------------------------

class PlacedStage(Stage):
    """A :class:`vmamba_mm.layers.Stage` whose blocks share what they want to know of the places of
    the pixels, which a subclass makes of a map."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__(blocks, downsample)
        self.blocks = nn.ModuleList(blocks)  # a sequence would not pass the places on

    def places(self, x: Tensor) -> Any:
        """Those of a map (B, H, W, C)."""
        raise NotImplementedError

    def _run_blocks(self, x: Tensor) -> Tensor:
        places = self.places(x)
        for block in self.blocks:
            x = block(x, places)
        return x


class RotaryStage(PlacedStage):
    """A stage whose blocks turn queries and keys by rows and columns, all by the same table.

    Args:
        blocks, downsample: as of :class:`vmamba_mm.layers.Stage`.
        dim: channels that turn, a multiple of 4: of a head, or of all heads, where the first half
            of the heads turns by rows and the second by columns.
        repeats: heads that turn alike, side by side.
        endpoint: as of :func:`vmamba_mm.ops.rotation.map_rotation_table`.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, dim: int,
                 repeats: int, endpoint: bool):
        super().__init__(blocks, downsample)
        self.dim, self.repeats, self.endpoint = dim, repeats, endpoint

    def places(self, x: Tensor) -> Tensor:
        """(H W, repeats dim / 2, 2), of :func:`turns_of_map`."""
        return turns_of_map(x, self.dim, self.repeats, self.endpoint)


def turns_of_map(x: Tensor, dim: int, repeats: int, endpoint: bool) -> Tensor:
    """The cosines and sines for the tokens of a map (B, H, W, C), (H W, repeats dim / 2, 2), as
    :func:`vmamba_mm.ops.linear_attention` takes them.

    Args:
        dim, repeats, endpoint: as of :class:`RotaryStage`.
    """
    table = map_rotation_table(*x.shape[1:3], dim, endpoint=endpoint, dtype=x.dtype,
                               device=x.device)
    return table.flatten(0, 1).repeat(1, repeats, 1)
