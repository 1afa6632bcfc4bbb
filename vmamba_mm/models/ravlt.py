"""The RAVLT backbone (arXiv 2411.07635): rank augmented linear attention, softmax at the end."""

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn

from vmamba_mm.families.ravlt import DEFAULTS, FAMILY, attentions_of, heads_of
from vmamba_mm.layers.map_blocks import GELUStem, RotaryStage, ScaledBlock
from vmamba_mm.layers.maps import ConvUnit, convolve_map
from vmamba_mm.models.projected import ProjectedBackbone
from vmamba_mm.ops import linear_attention
from vmamba_mm.ops.rotation import rotary_attention
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('linear_attention')
torch.fx.wrap('rotary_attention')


class GatedAttention(nn.Module):
    """Attention of all pixels, and a depthwise 5x5 convolution of the values beside it, times a
    projection of the input (section 3.3).

    Args:
        dim: C, channels.
        num_heads: n, which leaves each head a multiple of 4 of them.
        kind: 'linear' for rank augmented linear attention, whose cost is linear in the number of
            pixels, or 'softmax', where it is quadratic.

    Shape: (B, H, W, C), and the rotation of all channels, (H W, C / 2, 2) -> (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, kind: str):
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.qkvo = nn.Linear(dim, 4 * dim)  # queries, keys, values and what the result is times
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v, gate = self.qkvo(x).chunk(4, dim=-1)
        heads = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        if self.kind == 'linear':
            y = linear_attention(*heads, turns=turns, augmented=True)
        else:
            y = rotary_attention(*heads, turns)
        y = y.reshape(v.shape)
        return self.proj((y + convolve_map(self.lepe, v)) * gate)


@MODELS.register_module()
class RAVLT(ProjectedBackbone):
    """RAVLT as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``RAVLT.arch_settings``, or a dict with the keys ``embed_dims`` (channels of
            each of the 4 stages), ``depths`` (their blocks) and ``mlp_ratios``, and as it likes
            ``num_heads`` (of about 64 channels), ``attentions`` (of each stage 'linear' or
            'softmax', or a sequence with that of each block; softmax in the last two stages) and
            ``layer_scales`` (initial values, 0 for none; 1). With ``base``, the name of a published
            one, only the keys that differ from it, as ``dict(base='small', depths=(2, 2, 6, 2))``.
            The default is 'small'.
        out_indices: stages to return, each through a LayerNorm of its own, ``norm{i}``; all by
            default.
        projection: channels of a projection with batch norm and SiLU that the last stage's output
            has in place of its LayerNorm, 1024 in the published classifiers; None for none.
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
    norm_eps = 1e-6

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {**DEFAULTS, **self.arch}, iter(drop_path_rates), self.num_features
        half = dims[0] // 2
        self.patch_embed = GELUStem(in_channels, (half, half, half, dims[0]), (2, 1, 1, 2))
        self.stages = nn.ModuleList()
        for i, (dim, heads, kinds) in enumerate(zip(
                dims, heads_of(arch), attentions_of(arch), strict=True)):
            blocks = [ScaledBlock(
                GatedAttention(dim, heads, kind), dim, mlp_ratio=arch['mlp_ratios'][i],
                layer_scale=arch['layer_scales'][i], drop_path=next(rates), with_cp=with_cp)
                for kind in kinds]
            downsample = None if i == len(dims) - 1 else ConvUnit(dim, dims[i + 1], 3, 2, 1,
                                                                  act=False)
            self.stages.append(RotaryStage(blocks, downsample, dim // heads, heads, endpoint=True))
        self.add_norms()
        self.apply(_init)


def _init(module: nn.Module) -> None:
    """As published, all convolutions too: truncated normal of std 0.02, bias 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
