"""The EfficientViM backbone (arXiv 2411.15241): a few states, not all tokens, mix the channels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.families.efficientvim import DEFAULTS, FAMILY
from vmamba_mm.layers import DropPath, LayerNorm, LayerNorm2d, Stage
from vmamba_mm.layers.maps import ConvUnit, convolve_map
from vmamba_mm.models.base import Backbone
from vmamba_mm.ops import channels_last
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('channels_last')


# --- stem and downsampling ------------------------------------------------------------------------

class HighStrideStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with batch norms, and ReLUs between them:
    (B, in_channels, H, W) -> (B, ceil(H/16), ceil(W/16), C)."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        dims = [in_channels, embed_dims // 8, embed_dims // 4, embed_dims // 2, embed_dims]
        self.conv = nn.Sequential(*(
            ConvUnit(dims[i], dims[i + 1], 3, 2, 1, bias=False, act=i < 3) for i in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(channels_last(x))


class SqueezeExcite(nn.Module):
    """A factor for each channel, of the means of all of them (arXiv 1709.01507).

    The hidden layer has a quarter of the channels, rounded to a multiple of 8.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((1, 2), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(means))).sigmoid()


class SqueezedDownsample(nn.Module):
    """An inverted bottleneck of stride 2 with squeeze and excitation, between two depthwise 3x3
    convolutions that are added: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden = 4 * out_dim
        self.dwconv1 = _depthwise(dim)
        self.conv = nn.Sequential(
            ConvUnit(dim, hidden, bias=False),
            ConvUnit(hidden, hidden, 3, 2, 1, groups=hidden, bias=False),
            SqueezeExcite(hidden),
            ConvUnit(hidden, out_dim, bias=False, act=False))
        self.dwconv2 = _depthwise(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


def _depthwise(dim: int) -> ConvUnit:
    return ConvUnit(dim, dim, 3, 1, 1, groups=dim, bias=False, act=False)


# --- the block ------------------------------------------------------------------------------------

class HiddenStateMixer(nn.Module):
    """HSM-SSD, the paper's mixer: non-causal state space duality that mixes channels on the states.

    The tokens are summed up in N states with weights A * B, where A is a softmax over all tokens;
    gate and products between channels work on these, and C reads them out for each token. Where
    VSSD's mixer multiplies L tokens by matrices of C^2 numbers, this one does N states.

    Args:
        dim: C, channels of the block.
        d_state: N, number of the states.
        expand: channels inside by C.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W, and the states (B, N, C).
    """

    def __init__(self, dim: int, d_state: int, expand: float = 1.0):
        super().__init__()
        inner = int(expand * dim)
        self.BCdt_proj = nn.Linear(dim, 3 * d_state, bias=False)
        self.dw = nn.Conv2d(3 * d_state, 3 * d_state, 3, padding=1, groups=3 * d_state, bias=False)
        # The same for all tokens, over which there is a softmax: it has no effect.
        self.A = nn.Parameter(torch.empty(d_state).uniform_(1, 16))
        self.hz_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.D = nn.Parameter(torch.ones(1))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, C, dt = convolve_map(self.dw, self.BCdt_proj(x)).flatten(1, 2).chunk(3, dim=-1)
        # A cancels. Times 0 it leaves dt its digits in half precision, and has a gradient of 0, not
        # one of rounding errors, which an optimizer such as AdamW would take for steps.
        weights = (dt + 0 * self.A).softmax(1) * B
        states = weights.mT @ x.flatten(1, 2)
        h, z = self.hz_proj(states).chunk(2, dim=-1)
        states = self.out_proj(h * F.silu(z) + h * self.D)
        return (C @ states).view(x.shape), states


class ConvFeedForward(nn.Module):
    """1x1 convolution, batch norm and ReLU, and 1x1 convolution and batch norm.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = ConvUnit(dim, hidden, bias=False)
        self.fc2 = ConvUnit(hidden, dim, bias=False, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class EfficientViMBlock(nn.Module):
    """A depthwise convolution, the mixer, another depthwise convolution and an MLP. Each takes the
    place of what came to it in part: x becomes (1 - a) x + a f(x), with an a for each channel.

    Args:
        dim, d_state, expand: as of :class:`HiddenStateMixer`.
        mlp_ratio: hidden width of the MLP by C.
        drop_path: probability to drop one of the four changes.
        with_cp: recompute the block in the backward pass to save memory. Its batch norms then
            average the statistics of a step twice.

    Shape: (B, H, W, C) -> (B, H, W, C), and the states (B, N, C).
    """

    def __init__(self, dim: int, d_state: int, *, expand: float, mlp_ratio: float,
                 drop_path: float, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.dwconv1 = _depthwise(dim)
        self.norm = LayerNorm(dim, feeds_matmul=True)
        self.mixer = HiddenStateMixer(dim, d_state, expand)
        self.dwconv2 = _depthwise(dim)
        self.ffn = ConvFeedForward(dim, int(mlp_ratio * dim))
        self.alpha = nn.Parameter(torch.full((4, dim), 1e-4))  # through a sigmoid: a is 0.5
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.alpha.sigmoid().unbind()
        x = x + self.drop_path(parts[0] * (self.dwconv1(x) - x))
        mixed, states = self.mixer(self.norm(x))
        x = x + self.drop_path(parts[1] * (mixed - x))
        x = x + self.drop_path(parts[2] * (self.dwconv2(x) - x))
        return x + self.drop_path(parts[3] * (self.ffn(x) - x)), states


# --- the backbone ---------------------------------------------------------------------------------

class EfficientViMStage(Stage):
    """A :class:`vmamba_mm.layers.Stage` of blocks that give their states as well.

    Args of ``forward``:
        x, downsample, with_map: as there.
        with_states: also return the states of the last block, (B, N, C).
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__(blocks, downsample)
        self.blocks = nn.ModuleList(blocks)  # a sequence would pass the states on

    def forward(self, x: Tensor, downsample: bool = True, with_map: bool = False,
                with_states: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if not with_states:
            return super().forward(x, downsample, with_map)
        x, states = self._run_with_states(x)
        return x if self.downsample is None else self.downsample(x), states

    def _run_blocks(self, x: Tensor) -> Tensor:
        return self._run_with_states(x)[0]

    def _run_with_states(self, x):
        for block in self.blocks:
            x, states = block(x)
        return x, states


@MODELS.register_module()
class EfficientViM(Backbone):
    """EfficientViM as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``EfficientViM.arch_settings``, or a dict with the keys ``embed_dims``
            (channels of each of the 3 stages), ``depths`` (their blocks) and ``d_state`` (the
            number N of their states), and as it likes ``expand`` (1), of
            :class:`HiddenStateMixer`, and ``mlp_ratio`` (4). With ``base``, the name of a published
            one, only the keys that differ from it, as ``dict(base='m1', depths=(2, 4, 2))``. The
            default is 'm1'.
        out_indices: stages to return; all by default.
        with_states: return what the published classifiers read
            (:class:`vmamba_mm.heads.StageFusionHead`): the states of the last block of each stage,
            through LayerNorms ``norm0`` to ``norm2``, and the last map, through ``norm3``. Outputs
            have no norms otherwise, as in the published detectors.
        norm_eval: keep the batch norms in eval mode while training, as the published detectors do.
        drop_path_rate, frozen_stages, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`. The published models have no stochastic depth.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i) with
        C_i of embed_dims, H_0 = ceil(H / 16) and H_i = ceil(H_(i-1) / 2); with ``with_states`` to
        the states (B, C_i, N_i) of the three stages and the last map. All are contiguous.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'm1'
    classifier_options = dict(with_states=True)

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, with_states: bool = False, **kwargs):
        if not isinstance(with_states, bool):
            raise ValueError(f'with_states must be True or False, got {with_states!r}')
        # build() asks for it, and so does who builds a plain model with the same outputs.
        self.output_options = dict(with_states=True) if with_states else {}
        super().__init__(arch, out_indices, **kwargs)
        if with_states and self.out_indices != (len(self.depths) - 1,):
            raise ValueError('with_states=True gives the states and the map of the last stage: it '
                             f'needs out_indices=({len(self.depths) - 1},), got '
                             f'{self.out_indices}')

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(arch['embed_dims'])

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        return [16 * 2 ** i for i in range(len(arch['depths']))]

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return math.ceil(size / cls.stage_strides(arch)[-1])

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        found = super().arguments_of(weights)
        if 'out_indices' in found:  # norms, which the classifiers alone have
            found |= dict(with_states=True, out_indices=[2])
        return found

    @property
    def out_channels(self) -> list[int]:
        if not self.output_options:
            return super().out_channels
        return [*self.num_features, self.num_features[-1]]

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {**DEFAULTS, **self.arch}, iter(drop_path_rates), self.num_features
        self.patch_embed = HighStrideStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, self.depths, strict=True)):
            blocks = [EfficientViMBlock(dim, arch['d_state'][i], expand=arch['expand'],
                                        mlp_ratio=arch['mlp_ratio'], drop_path=next(rates),
                                        with_cp=with_cp) for _ in range(depth)]
            downsample = None if i == len(dims) - 1 else SqueezedDownsample(dim, dims[i + 1])
            self.stages.append(EfficientViMStage(blocks, downsample))
        if self.output_options:
            for i, dim in enumerate(dims):
                self.add_module(f'norm{i}', LayerNorm(dim))
            self.add_module(f'norm{len(dims)}', LayerNorm2d(dims[-1]))
        # All starts as torch sets it: what is Linear here is a convolution in the official code.

    def output_norm(self, i: int) -> nn.Module | None:
        """The norm of the last map, where states are returned beside it."""
        return self.norm3 if self.output_options and i == self.out_indices[-1] else None

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.output_options:
            return super().forward_channels_last(x)
        x, outs = self.patch_embed(x), []
        for stage, norm in zip(self.stages, (self.norm0, self.norm1, self.norm2), strict=True):
            x, states = stage(x, with_states=True)
            outs.append(norm(states).mT)
        return *outs, self.norm_output(self.out_indices[-1], x)
