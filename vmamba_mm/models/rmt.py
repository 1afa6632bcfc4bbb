"""The RMT backbone (arXiv 2309.11523): attention that decays with the distance of pixels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.families.rmt import DEFAULTS, FAMILY, PROJECTION
from vmamba_mm.layers import DropPath, LayerNorm, LayerNorm2d, Stage
from vmamba_mm.layers.maps import ConvUnit, add_convolution, batch_norm_map, convolve_map
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.layers.plain import Attributes, are_plain, is_depthwise, is_plain
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.ops import add_norm, channels_last, conv_mlp, masa, masa_mixer
from vmamba_mm.ops.core.backends import autocast_dtype, compute_dtype, runs_kernels
from vmamba_mm.ops.masa import decay_masks, needs_masks
from vmamba_mm.ops.rmt_block import Weights, rmt_block, why_not
from vmamba_mm.ops.rotation import rotation_table
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('add_norm')
torch.fx.wrap('channels_last')
torch.fx.wrap('masa')
torch.fx.wrap('place')
torch.fx.wrap('sum_and_norm')


# --- attention ------------------------------------------------------------------------------------

class Places(NamedTuple):
    """What attention has to know of the places of pixels; the blocks of a stage share it."""

    decay: Tensor  #: (n), logarithms, of :func:`make_decay`
    turns: Tensor  #: (H, W, P / 2, 2), of queries and keys: cosines and sines
    #: Of :func:`vmamba_mm.ops.decay_masks`; None where a kernel needs none.
    masks: tuple[Tensor, ...] | None


def place(x: Tensor, decay: Tensor, head_dim: int, form: str) -> Places:
    """The places of the pixels of a map (B, H, W, C), for a decay (n).

    Queries and keys turn by the number of the pixel in the order of rows, h W + w, so that it
    depends on the width.
    """
    height, width = x.shape[1:3]
    numbers = torch.arange(height * width, device=x.device).view(height, width)
    turns = rotation_table(numbers, head_dim, x.dtype)
    wide = decay.to(compute_dtype(decay.dtype))
    masks = decay_masks(wide, height, width, form) if needs_masks(x, len(decay), form) else None
    return Places(wide, turns, masks)


def make_decay(num_heads: int, init_value: float = 2.0, heads_range: float = 4.0) -> Tensor:
    """(n), the logarithms of what each head keeps of a weight from pixel to pixel, which is
    1 - 2^(-init_value - heads_range h / n) for head h, in fp32."""
    heads = torch.arange(num_heads, dtype=torch.float64)
    return torch.log1p(-2 ** (-init_value - heads_range * heads / num_heads)).float()


class ManhattanAttention(nn.Module):
    """Manhattan self-attention (MaSA, sections 3.2 and 3.3): projections around
    :func:`vmamba_mm.ops.masa`, and a depthwise 5x5 convolution of the values beside it.

    Args:
        dim: C, channels.
        num_heads: n, which leaves each head an even number of channels.
        form: as of :func:`vmamba_mm.ops.masa`.

    Shape: (B, H, W, C), and the :class:`Places` of the map -> (B, H, W, C), any H and W.
    """

    def __init__(self, dim: int, num_heads: int, form: str):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f'num_heads={num_heads} must leave each head an even number of the '
                             f'{dim} channels')
        self.num_heads, self.form = num_heads, form
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4))
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        linears = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        if runs_kernels(x) and are_plain(linears, (nn.Linear,) * 4) \
                and is_depthwise(self.lepe, 5) and _have_biases(*linears, self.lepe):
            q, k, v, out, lepe = (_parameters(module) for module in (*linears, self.lepe))
            return masa_mixer(x, q, k, v, lepe, out, places.decay, places.turns, self.form,
                              masks=places.masks)
        v = self.v_proj(x)
        q, k, values = (t.unflatten(-1, (self.num_heads, -1))
                        for t in (self.q_proj(x), self.k_proj(x), v))
        y = masa(q, k, values, places.decay, self.form, masks=places.masks, turns=places.turns)
        return self.out_proj(y.flatten(3) + convolve_map(self.lepe, v))


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _have_biases(*modules: nn.Module) -> bool:
    """Not so if a user has put others in their place."""
    return all([module.bias is not None for module in modules])


class PlacedAttention(nn.Module):
    """:class:`ManhattanAttention` with a decay of its own: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim, num_heads, form, init_value, heads_range: as there and of :func:`make_decay`.
    """

    def __init__(self, dim: int, num_heads: int, form: str = 'decomposed', init_value: float = 2.0,
                 heads_range: float = 4.0):
        super().__init__()
        self.attn = ManhattanAttention(dim, num_heads, form)
        # A layer alone has no decay among its weights; in the published models the stage has it.
        self.register_buffer('decay', make_decay(num_heads, init_value, heads_range),
                             persistent=False)
        self.head_dim, self.form = dim // num_heads, form

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, self.places(x))

    def places(self, x: Tensor) -> Places:
        """Those of a map (B, H, W, C)."""
        return place(x, self.decay, self.head_dim, self.form)


# --- the block ------------------------------------------------------------------------------------

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
                and is_depthwise(conv, 3) and _have_biases(fc1, conv, fc2):
            return conv_mlp(x, fc1.weight, fc1.bias, conv.weight, conv.bias, fc2.weight, fc2.bias)
        return fc2(add_convolution(conv, F.gelu(fc1(x))))


class RMTBlock(nn.Module):
    """A depthwise convolution, attention and an MLP; all are residual branches.

    On an NVIDIA GPU it is one op, ``rmt_block``, under torch.compile too, or goes step by step;
    ``why_not_one_op`` says what keeps it from that.

    Args:
        dim: C, channels.
        num_heads, form: as of :class:`ManhattanAttention`.
        mlp_ratio: hidden width of the MLP by C.
        layer_scale: initial value of the factors of the last two branches; 0 for none.
        drop_path: probability to drop one of these two branches.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, H, W, C), with the :class:`Places` of the stage -> (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, form: str, *, mlp_ratio: float, layer_scale: float,
                 drop_path: float, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (LayerNorm(dim, feeds_matmul=True, eps=1e-6) for _ in range(2))
        self.attn = ManhattanAttention(dim, num_heads, form)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        # Of four dimensions, as published: so they have weight decay, unlike biases.
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((1, 1, 1, dim), layer_scale)) if layer_scale else None
            for _ in range(2))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, places,
                                                     use_reentrant=False)
        return self._forward(x, places)

    def _forward(self, x: Tensor, places: Places) -> Tensor:
        drop: Callable[[Tensor], Tensor] = self.drop_path
        scales: tuple[Tensor | None, ...] = (None, None)
        if is_plain(drop, DropPath):  # then the factors go into the sums
            scales, drop = drop.factors(x, 2), _identity
            weights = _weights_for_op(self, x, places)
            if not isinstance(weights, str):
                return rmt_block(x, weights, places.decay, places.turns, scales, self.attn.form,
                                 self.norm1.eps, autocast_dtype(x) or x.dtype)
        x = add_convolution(self.pos, x)
        branch = drop(_scaled(self.attn(self.norm1(x), places), self.gamma_1))
        x, normed = sum_and_norm(self.norm2, x, branch, scales[0])
        branch = drop(_scaled(self.mlp(normed), self.gamma_2))
        return add_norm(x, branch, None, None, scale=scales[1])[0]

    def why_not_one_op(self, x: Tensor, places: Places) -> str | None:
        """The reason why the block does not run as one op on ``x``, but step by step, or None."""
        if not is_plain(self.drop_path, DropPath):
            return _NOT_PLAIN
        weights = _weights_for_op(self, x, places)
        return weights if isinstance(weights, str) else None


_NOT_PLAIN = 'a module has a hook, is wrapped, or is of another class'
# The modules of a block whose parameters the op takes, as in _weights_for_op.
_CLASSES = (ManhattanAttention, ConvMlp, nn.Conv2d, LayerNorm, *[nn.Linear] * 3, nn.Conv2d,
            nn.Linear, LayerNorm, nn.Linear, nn.Conv2d, nn.Linear)


def _weights_for_op(block: RMTBlock, x: Tensor, places: Places) -> Weights | str:
    """The parameters for the op ``rmt_block``, or what keeps the block from being that op.

    The op does not drop paths; that is for who calls it to look at.
    """
    if not runs_kernels(x):
        return 'the input is not on a GPU'  # or torch.fx records the steps
    # Past nn.Module.__getattr__, which takes longer than the questions.
    modules = block._modules
    attention, mlp = modules['attn'], modules['mlp']
    if not are_plain((attention, mlp), _CLASSES[:2]):
        return _NOT_PLAIN
    of_attention, of_mlp = attention._modules, mlp._modules
    leaves = (modules['pos'], modules['norm1'], of_attention['q_proj'], of_attention['k_proj'],
              of_attention['v_proj'], of_attention['lepe'], of_attention['out_proj'],
              modules['norm2'], of_mlp['fc1'], of_mlp['dwconv'], of_mlp['fc2'])
    if not are_plain(leaves, _CLASSES[2:]):
        return _NOT_PLAIN
    if not (is_depthwise(leaves[0], 3) and is_depthwise(leaves[5], 5)
            and is_depthwise(leaves[9], 3)):
        return 'a convolution is not a depthwise one of 3x3, or 5x5, that keeps the size'
    if leaves[1].eps != leaves[7].eps:
        return 'its norms differ in eps'
    try:
        parameters = [module._parameters[name] for module in leaves for name in _OF_MODULE]
    except KeyError:
        parameters = [Attributes(module)[name] for module in leaves for name in _OF_MODULE]
    if any([parameter is None for parameter in parameters]):
        return 'a module lacks weight or bias'
    weights = Weights(*parameters, block.gamma_1, block.gamma_2)
    return why_not(x, weights, places.decay, places.turns, attention.form == 'whole',
                   autocast_dtype(x) or x.dtype) or weights


_OF_MODULE = 'weight', 'bias'


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


def _identity(branch: Tensor) -> Tensor:
    return branch


# --- the backbone ---------------------------------------------------------------------------------

class RMTStem(nn.Module):
    """Four 3x3 convolutions with batch norms, two of which stride, and GELUs between them:
    (B, in_channels, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        half = embed_dims // 2
        self.conv1 = ConvUnit(in_channels, half, 3, 2, 1, act_layer=nn.GELU)
        self.conv2 = ConvUnit(half, half, 3, 1, 1, act_layer=nn.GELU)
        self.conv3 = ConvUnit(half, embed_dims, 3, 2, 1, act_layer=nn.GELU)
        self.conv4 = ConvUnit(embed_dims, embed_dims, 3, 1, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv4(self.conv3(self.conv2(self.conv1(channels_last(x)))))


class RMTStage(Stage):
    """A :class:`vmamba_mm.layers.Stage` whose blocks share the places of the pixels, and so a
    decay, of :func:`make_decay`, and the channels and the form of their heads."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, decay: Tensor,
                 head_dim: int, form: str):
        super().__init__(blocks, downsample)
        self.blocks = nn.ModuleList(blocks)  # a sequence would not pass the places on
        self.head_dim, self.form = head_dim, form
        self.register_buffer('decay', decay)

    def _run_blocks(self, x: Tensor) -> Tensor:
        places = place(x, self.decay, self.head_dim, self.form)
        for block in self.blocks:
            x = block(x, places)
        return x


class MapProjection(nn.Module):
    """What the published classifiers have before their pooling: Linear, batch norm and SiLU.

    Shape: (B, C, H, W) -> (B, C', H, W).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, out_dim)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(batch_norm_map(self.norm, self.proj(x.permute(0, 2, 3, 1)))).permute(
            0, 3, 1, 2)


@MODELS.register_module()
class RMT(Backbone):
    """RMT as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``RMT.arch_settings``, or a dict with the keys ``embed_dims`` (channels of
            each of the 4 stages), ``depths`` (their blocks), ``num_heads`` and ``mlp_ratios``, and
            as it likes ``forms`` (of attention, 'decomposed' or 'whole'; whole in the last stage),
            ``init_values`` (2) and ``heads_ranges`` (4, 4, 6, 6) of the decay, as of
            :func:`make_decay`, and ``layer_scales`` (initial values, 0 for none). With
            ``base``, the name of a published one, only the keys that differ from it, as
            ``dict(base='small', depths=(2, 2, 9, 2))``. The default is 'small'.
        out_indices: stages to return, each through a LayerNorm of its own, ``norm{i}``; all by
            default.
        projection: channels of a projection with batch norm and SiLU that the last stage's output
            has in place of its LayerNorm, 1024 in the published classifiers; None for none.
        with_last_map: put the last stage's map, without norm, before the outputs, for the head of
            token labelling.
        norm_eval: keep the batch norms of the stem and of the downsamplings in eval mode while
            training. The published detectors and segmentors train them, synchronised.
        drop_path_rate, frozen_stages, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i) with
        C_i of embed_dims, H_0 = ceil(H / 4) and H_i = ceil(H_(i-1) / 2). The maps are contiguous.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'small'
    classifier_options = dict(projection=PROJECTION)

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, projection: int | None = None,
                 with_last_map: bool = False, **kwargs):
        if projection is not None and (not isinstance(projection, int) or projection < 1):
            raise ValueError('projection must be an int of at least 1, or None, got '
                             f'{projection!r}')
        # build() asks for it, and so does who builds a plain model with the same outputs.
        self.output_options = {} if projection is None else dict(projection=projection)
        self.with_last_map = with_last_map
        super().__init__(arch, out_indices, **kwargs)
        last = len(self.depths) - 1
        if (projection is not None or with_last_map) and self.out_indices[-1] != last:
            raise ValueError('projection and with_last_map are of the last stage, which '
                             f'out_indices={self.out_indices} lacks')

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(arch['embed_dims'])

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return math.ceil(size / cls.stage_strides(arch)[-1])

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {**DEFAULTS, **self.arch}, iter(drop_path_rates), self.num_features
        self.patch_embed = RMTStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth, heads, form) in enumerate(zip(
                dims, self.depths, arch['num_heads'], arch['forms'], strict=True)):
            blocks = [RMTBlock(dim, heads, form, mlp_ratio=arch['mlp_ratios'][i],
                               layer_scale=arch['layer_scales'][i], drop_path=next(rates),
                               with_cp=with_cp) for _ in range(depth)]
            downsample = None if i == len(dims) - 1 else ConvUnit(dim, dims[i + 1], 3, 2, 1,
                                                                  act=False)
            decay = make_decay(heads, arch['init_values'][i], arch['heads_ranges'][i])
            self.stages.append(RMTStage(blocks, downsample, decay, dim // heads, form))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i]))
        if self.output_options:
            last = len(dims) - 1
            out_dim = self.output_options['projection']
            self.add_module(f'norm{last}', MapProjection(dims[last], out_dim))
            self.num_features = [*dims[:-1], out_dim]
        self.apply(init_linear)  # the rest starts as torch sets it

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.forward_stages(x, self.out_indices)
        outs = tuple(self.norm_output(i, y) for i, y in zip(self.out_indices, maps, strict=True))
        return (maps[-1].movedim(-1, 1), *outs) if self.with_last_map else outs
