"""The VMamba backbone (arXiv 2401.10166)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vmamba_mm.families.vmamba import FAMILY, stage_dims
from vmamba_mm.layers import (
    SS2D,
    SSD2D,
    ConvDownsample,
    ConvStem,
    LayerNorm2d,
    MergeDownsample,
    PatchStem,
    VSSBlock,
    VSSStage,
)
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.ops.ss2d_scan.patterns import NUM_ROUTES, num_routes
from vmamba_mm.registry import MODELS

_STEMS = {'patch': PatchStem, 'conv': ConvStem}
_DOWNSAMPLES = {'merge': MergeDownsample, 'conv': ConvDownsample}
_SSM_KEYS = ('d_state', 'ssm_ratio', 'dt_rank', 'conv_bias', 'gate', 'act', 'conv_kernel',
             'ssm_init')
#: By core, the layer and the keys that it alone has.
_CORES = {'s6': (SS2D, ('scan',)), 'ssd': (SSD2D, ('gate_act', 'out_norm', 'out_act'))}


@MODELS.register_module()
class VMamba(Backbone):
    """VMamba as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``VMamba.arch_settings``, or a dict with the keys ``embed_dims``
            (channels C of the first stage, doubled at each further one, or those of the 4 stages),
            ``depths`` (blocks of the 4 stages), ``d_state`` (N), ``ssm_ratio`` (D / C), ``dt_rank``
            ('auto' for ceil(C / 16), or an int), ``conv_bias``, ``gate`` (the SiLU(z) branch),
            ``mlp_ratio`` (0 for no MLP), ``stem`` ('patch' or 'conv'), ``downsample`` ('merge' or
            'conv'), ``scan`` ('cross', 'unidirectional', 'bidirectional', 'cascade', or a name of
            :func:`vmamba_mm.ops.register_scan`), and as it likes ``act`` ('silu', 'gelu' or
            'relu'), ``conv_kernel`` (3; 0 for no convolution) and ``ssm_init`` ('mamba', 'random'
            or 'zero'), as of :class:`SS2D`. ``core`` is 's6', or 'ssd' for :class:`SSD2D` in place
            of SS2D (VMamba with Mamba-2's operator, which its authors never trained), which has
            ``gate_act``, ``out_norm`` and ``out_act`` besides, and 'cross' as its only ``scan``.
            With ``base``, the name of a published one, only the keys that differ from it:
            ``dict(base='tiny_s1l8', depths=(2, 2, 4, 2))``. The default is 'tiny_s1l8'.
        out_indices: stages to return, each through a norm of its own, ``norm{i}``; all by default.
        norm_eval: as of :class:`Backbone`. The model itself has layer norms only, which keep no
            statistics, so this matters to modules swapped in.
        drop_path_rate, frozen_stages, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i) with
        C_i = embed_dims * 2^i, or as given, and H_i about H / (4 * 2^i): the 'conv' stem and both
        downsamplings round up, the 'patch' stem down. The maps are contiguous.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny_s1l8'

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(stage_dims(arch['embed_dims']))

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates = self.arch, iter(drop_path_rates)
        ssm_type, own_keys = _CORES[arch.get('core', 's6')]
        ssm_cfg = {key: arch[key] for key in (*_SSM_KEYS, *own_keys) if key in arch}
        if ssm_type is SS2D and (routes := num_routes(arch['scan'])) != NUM_ROUTES:
            raise ValueError(f"arch['scan']={arch['scan']!r} has {routes} routes and VMamba's "
                             f'blocks have {NUM_ROUTES}; RemoteSensingMamba takes it')
        self.patch_embed = _STEMS[arch['stem']](in_channels, self.num_features[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.num_features, self.depths, strict=True)):
            last = i == len(self.depths) - 1
            blocks = [VSSBlock(dim, mlp_ratio=arch['mlp_ratio'], drop_path=next(rates),
                               with_cp=with_cp, ssm_cfg=ssm_cfg, ssm_type=ssm_type,
                               feeds_matmul=not last and j == depth - 1) for j in range(depth)]
            downsample = None if last else _DOWNSAMPLES[arch['downsample']](
                dim, self.num_features[i + 1])
            self.stages.append(VSSStage(blocks, downsample))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(self.num_features[i]))
        self.apply(init_linear)  # the rest starts as torch, SS2D or SSD2D sets it
