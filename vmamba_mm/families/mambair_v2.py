"""MambaIRv2 (arXiv 2411.15269): its published architectures and the names of its weights.

Our names are the official ones. The numbers of the official code are compared by
:mod:`vmamba_mm.families.mambair`.
"""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, is_number, one_of
from vmamba_mm.families.mambair import (
    DEPTHS,
    TAIL_RULES,
    check_upscale,
    count_groups,
    group_keys,
    infer_tail,
)
from vmamba_mm.families.mambair_unet import ssm_ratio_of


def _arch(dim: int, groups: int, depth: int, heads: int, upscale: int, **change: Any
          ) -> dict[str, Any]:
    return dict(embed_dims=dim, depths=(depth,) * groups, num_heads=(heads,) * groups, d_state=16,
                window_size=16, inner_rank=64, num_tokens=128, mlp_ratio=2.0, ffn='conv',
                conv_kernel=5, resi_connection='1conv', upsampler='pixelshuffle',
                upscale=upscale) | change


_LIGHT = dict(d_state=8, inner_rank=32, num_tokens=64, mlp_ratio=1.0, ffn='gated',
              upsampler='pixelshuffledirect')

#: By size and scale; 'denoise' is that of colour noise and of JPEG artefacts.
ARCHS = {
    **{f'small_x{n}': _arch(132, 6, 4, 4, n) for n in (2, 3, 4)},
    **{f'base_x{n}': _arch(174, 6, 6, 6, n) for n in (2, 3, 4)},
    **{f'large_x{n}': _arch(174, 9, 6, 6, n) for n in (2, 3, 4)},
    **{f'light_x{n}': _arch(48, 4, 5, 4, n, **_LIGHT) for n in (2, 3, 4)},
    'denoise': _arch(174, 6, 6, 6, 1, upsampler=''),
    'real_sr_x4': _arch(174, 6, 6, 6, 4, upsampler='nearest+conv'),
}

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 3), 'an int of at least 3'),
    'depths': DEPTHS,
    'num_heads': DEPTHS,
    'd_state': _INT,
    'window_size': Rule(lambda v: is_int(v, 2), 'an int of at least 2'),
    'inner_rank': _INT,
    'num_tokens': _INT,
    'mlp_ratio': Rule(lambda v: is_number(v, 0.1), 'a number of at least 0.1'),
    'ffn': one_of('conv', 'gated'),
    'conv_kernel': Rule(lambda v: is_int(v, 1) and v % 2 == 1, 'an odd int of at least 1'),
    **TAIL_RULES,
}


def _check(arch: Mapping[str, Any]) -> None:
    check_upscale(arch)
    dim, heads = arch['embed_dims'], arch['num_heads']
    if len(heads) != len(arch['depths']):
        raise ValueError(f"arch['num_heads']={tuple(heads)!r} must have an entry for each of the "
                         f'{len(arch["depths"])} groups')
    if any(dim % n for n in heads):
        raise ValueError(f"arch['num_heads']={tuple(heads)!r} must divide embed_dims={dim}")
    hidden = int(arch['mlp_ratio'] * dim)
    if arch['ffn'] == 'gated' and hidden % 2:
        raise ValueError(f"arch['ffn']='gated' halves the {hidden} channels that mlp_ratio "
                         f'{arch["mlp_ratio"]} makes of {dim}: their number must be even')
    if arch['ffn'] == 'gated' and arch['conv_kernel'] != 5:
        raise ValueError(f"arch['conv_kernel']={arch['conv_kernel']!r} must be 5 with ffn='gated', "
                         'as published')


_LAYER = 'layers.0.residual_group.layers.0'


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dim, = shapes[f'{_LAYER}.scale1']
    depths = count_groups(shapes, 'layers')
    inner, d_state = shapes[f'{_LAYER}.assm.selectiveScan.A_logs']
    num_tokens, inner_rank = shapes[f'{_LAYER}.assm.embeddingB.weight']
    tables = [shapes[f'layers.{i}.residual_group.layers.0.win_mhsa.relative_position_bias_table']
              for i in range(len(depths))]
    is_gated = f'{_LAYER}.convffn1.sg.conv.weight' in shapes
    conv = 'sg.conv' if is_gated else 'dwconv.depthwise_conv.0'
    return dict(embed_dims=dim, depths=depths, num_heads=tuple(heads for _, heads in tables),
                d_state=d_state, window_size=(int(tables[0][0] ** 0.5) + 1) // 2,
                inner_rank=inner_rank, num_tokens=num_tokens, mlp_ratio=ssm_ratio_of(inner, dim),
                ffn='gated' if is_gated else 'conv',
                conv_kernel=shapes[f'{_LAYER}.convffn1.{conv}.weight'][-1], **infer_tail(shapes))


FAMILY = Family(
    name='mambair_v2', model='MambaIRv2', archs=ARCHS, rules=RULES, check=_check,
    keys=group_keys('relative_position_index_SA', *(
        f'layers.#.residual_group.layers.#.{name}' for name in (
            'scale1', 'scale2', 'norm1', 'norm2', 'norm3', 'norm4', 'wqkv', 'win_mhsa', 'assm',
            'convffn1', 'convffn2', 'embeddingA'))),
    signature=(f'{_LAYER}.scale1', f'{_LAYER}.scale2', f'{_LAYER}.assm.selectiveScan.A_logs',
               f'{_LAYER}.assm.embeddingB.weight', f'{_LAYER}.embeddingA.weight',
               f'{_LAYER}.wqkv.weight', f'{_LAYER}.win_mhsa.relative_position_bias_table',
               'conv_first.weight', 'patch_embed.norm.weight', 'norm.weight'),
    first_convs=('conv_first.weight',), infer_arch=_infer_arch, system='mambair',
    task='restoration', weights_key='params', licence='Apache-2.0',
    url='https://github.com/csguoh/MambaIR')
