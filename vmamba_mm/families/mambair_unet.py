"""MambaIR's U-Net for real noise (arXiv 2402.15648): its published architecture and its names.

Our names of weights are the official ones. The numbers of the official code are compared by
:mod:`vmamba_mm.families.mambair`.
"""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, are_ints, is_int, is_number

#: The paper's, of SIDD.
ARCHS = {'real_denoise': dict(embed_dims=48, depths=(4, 6, 6, 8), refinement_depth=4, d_state=16,
                              ssm_ratio=1.5)}

RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 30) and v % 2 == 0, 'an even int of at least 30'),
    'depths': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'refinement_depth': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'd_state': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'ssm_ratio': Rule(lambda v: is_number(v, 0.1), 'a number of at least 0.1'),
}

_LEVELS = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')
_KEYS = tuple((name, name) for name in (
    'patch_embed.proj', *(f'{level}.#' for level in _LEVELS), 'down1_2.body.#', 'down2_3.body.#',
    'down3_4.body.#', 'up4_3.body.#', 'up3_2.body.#', 'up2_1.body.#', 'reduce_chan_level3',
    'reduce_chan_level2', 'decoder_level3.#', 'decoder_level2.#', 'decoder_level1.#',
    'refinement.#', 'output'))


def ssm_ratio_of(inner: int, dim: int) -> float:
    """The ratio of which int(ratio * dim) is ``inner``: a published one where that fits."""
    published = (ratio for ratio in (1.2, 1.5, 2.0, 1.0) if int(ratio * dim) == inner)
    ratio = next(published, inner / dim)
    return ratio if int(ratio * dim) == inner else (inner + 0.5) / dim


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    blocks = {m.groups() for k in shapes if (m := re.match(r'(\w+)\.(\d+)\.ln_1\.weight$', k))}
    depths = tuple(sum(name == level for name, _ in blocks) for level in _LEVELS)
    dim, = shapes['encoder_level1.0.skip_scale']
    _, d_state = shapes['encoder_level1.0.self_attention.A_logs']
    inner = shapes['encoder_level1.0.self_attention.out_norm.weight'][0]
    return dict(embed_dims=dim, depths=depths,
                refinement_depth=sum(name == 'refinement' for name, _ in blocks), d_state=d_state,
                ssm_ratio=ssm_ratio_of(inner, dim))


_FIRST = 'encoder_level1.0'
FAMILY = Family(
    name='mambair_unet', model='MambaIRUNet', archs=ARCHS, rules=RULES, keys=_KEYS,
    signature=(f'{_FIRST}.skip_scale', f'{_FIRST}.skip_scale2', f'{_FIRST}.ln_1.weight',
               f'{_FIRST}.self_attention.A_logs', f'{_FIRST}.self_attention.out_norm.weight',
               f'{_FIRST}.conv_blk.cab.3.attention.1.weight', 'patch_embed.proj.weight',
               'down1_2.body.0.weight', 'reduce_chan_level3.weight', 'refinement.0.skip_scale',
               'output.weight'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, system='mambair',
    task='restoration', weights_key='params', licence='Apache-2.0',
    url='https://github.com/csguoh/MambaIR')
