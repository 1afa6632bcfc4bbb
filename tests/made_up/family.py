"""Ripple, a family that nobody published: flat, a position embedding, one S6 scan in each block."""

import re
from pathlib import Path

from vmamba_mm.families import Family, Rule
from vmamba_mm.families.base import is_int

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')


def _infer_arch(weights):
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, _, _, patch_size = shapes['patch_embed.weight']
    _, tokens, _ = shapes['pos_embed']
    grid = round(tokens ** 0.5)
    if grid ** 2 != tokens:
        raise ValueError('the position embedding is not that of a square image')
    _, d_state = shapes['blocks.0.mixer.A_log']
    depth = len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})
    return dict(embed_dims=dims, depth=depth, d_state=d_state, patch_size=patch_size,
                image_size=grid * patch_size)


FAMILY = Family(
    name='ripple', model='Ripple',
    archs={'nano': dict(embed_dims=16, depth=2, d_state=4, patch_size=16, image_size=224),
           'micro': dict(embed_dims=32, depth=4, d_state=4, patch_size=16, image_size=224)},
    rules=dict(embed_dims=_INT, depth=_INT, d_state=_INT, patch_size=_INT, image_size=_INT),
    keys=(('patch_embed.proj', 'patch_embed'), ('pos_embed', 'pos_embed'), ('blocks.#', 'blocks.#'),
          ('norm_f', 'norm'), ('freqs', None)),
    head_keys=(('head', 'head.fc'),),
    signature=('blocks.0.mixer.A_log', 'blocks.0.mixer.dt_bias', 'blocks.0.mixer.x_proj.weight',
               'pos_embed', 'patch_embed.weight', 'norm.weight'),
    first_convs=('patch_embed.weight',), infer_arch=_infer_arch,
    configs=Path(__file__).parent / 'configs/ripple')
