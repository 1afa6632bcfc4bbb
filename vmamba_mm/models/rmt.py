"""The RMT backbone (arXiv 2309.11523): attention that decays with the distance of pixels."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from vmamba_mm.families.rmt import DEFAULTS, FAMILY
from vmamba_mm.layers import DropPath, LayerNorm
from vmamba_mm.layers.map_blocks import ConvMlp, GELUStem, PlacedStage, ScaledBlock, have_biases
from vmamba_mm.layers.maps import ConvUnit, convolve_map
from vmamba_mm.layers.plain import Attributes, are_plain, is_depthwise, is_plain
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.projected import ProjectedBackbone
from vmamba_mm.ops import masa, masa_mixer
from vmamba_mm.ops.core.backends import autocast_dtype, compute_dtype, runs_kernels
from vmamba_mm.ops.masa import decay_masks, needs_masks
from vmamba_mm.ops.rmt_block import Weights, rmt_block, why_not
from vmamba_mm.ops.rotation import rotation_table
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('masa')
torch.fx.wrap('place')


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
                and is_depthwise(self.lepe, 5) and have_biases(*linears, self.lepe):
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

class RMTBlock(ScaledBlock):
    """A depthwise convolution, attention and an MLP; all are residual branches.

    On an NVIDIA GPU it is one op, ``rmt_block``, under torch.compile too, or goes step by step;
    ``why_not_one_op`` says what keeps it from that.

    Args:
        dim: C, channels.
        num_heads, form: as of :class:`ManhattanAttention`.
        kwargs: as of :class:`vmamba_mm.layers.map_blocks.ScaledBlock`.

    Shape: (B, H, W, C), with the :class:`Places` of the stage -> (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, form: str, **kwargs):
        super().__init__(ManhattanAttention(dim, num_heads, form), dim, **kwargs)

    def _run_as_one_op(self, x: Tensor, places: Places, scales: tuple[Tensor | None, ...]
                       ) -> Tensor | None:
        weights = _weights_for_op(self, x, places)
        if isinstance(weights, str):
            return None
        return rmt_block(x, weights, places.decay, places.turns, scales, self.attn.form,
                         self.norm1.eps, autocast_dtype(x) or x.dtype)

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


# --- the backbone ---------------------------------------------------------------------------------

class RMTStage(PlacedStage):
    """A stage whose blocks share the :class:`Places` of the pixels, and so a decay, of
    :func:`make_decay`, and the channels and the form of their heads."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, decay: Tensor,
                 head_dim: int, form: str):
        super().__init__(blocks, downsample)
        self.head_dim, self.form = head_dim, form
        self.register_buffer('decay', decay)

    def places(self, x: Tensor) -> Places:
        return place(x, self.decay, self.head_dim, self.form)


@MODELS.register_module()
class RMT(ProjectedBackbone):
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

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, projection: int | None = None,
                 with_last_map: bool = False, **kwargs):
        self.with_last_map = with_last_map
        super().__init__(arch, out_indices, projection, **kwargs)
        if with_last_map and not self.returns_last_stage:
            raise ValueError('with_last_map is of the last stage, which '
                             f'out_indices={self.out_indices} lacks')

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {**DEFAULTS, **self.arch}, iter(drop_path_rates), self.num_features
        half = dims[0] // 2
        self.patch_embed = GELUStem(in_channels, (half, half, dims[0], dims[0]), (2, 1, 2, 1))
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
        self.add_norms()
        self.apply(init_linear)  # the rest starts as torch sets it

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.forward_stages(x, self.out_indices)
        outs = tuple(self.norm_output(i, y) for i, y in zip(self.out_indices, maps, strict=True))
        return (maps[-1].movedim(-1, 1), *outs) if self.with_last_map else outs
