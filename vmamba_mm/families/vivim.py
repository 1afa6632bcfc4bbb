"""ViViM, the backbone of Video Mamba Suite (arXiv 2403.09626, section 4.5): names of its weights.

Its names are those of Vim with a temporal embedding more.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vmamba_mm.families.base import (
    Family,
    Rule,
    are_ints,
    infer_image_size,
    is_int,
    is_number,
    one_of,
)
from vmamba_mm.families.video_mamba_suite import LICENCE, PARITY, SYSTEM, URL


def _arch(embed_dims: int) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depth=24, d_state=16, expand=2.0, mixer='bidirectional',
                cls_token='frame', patch_size=16, image_size=224, num_frames=16)


ARCHS = {'tiny': _arch(192), 'small': _arch(384)}

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': _INT, 'depth': _INT, 'd_state': _INT,
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0'),
    'mixer': one_of('bidirectional', 'scan_norm', 'decomposed'),
    'cls_token': one_of('frame', 'clip'),
    'patch_size': _INT,
    'image_size': Rule(lambda v: is_int(v, 1) or are_ints(v, 1, 2),
                       'an int of at least 1, or two of them, height and width'),
    'num_frames': _INT,
    # What the mixers take if an arch says nothing is what is published.
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
    'reduce': one_of('mean', 'sum').or_absent(),
}


def grid_of(arch: Mapping[str, Any]) -> tuple[int, int]:
    """The patches of a frame, in rows and columns."""
    size = arch['image_size']
    height, width = (size, size) if isinstance(size, int) else size
    return height // arch['patch_size'], width // arch['patch_size']


def check_grid(arch: Mapping[str, Any]) -> None:
    """Raise ValueError if a frame has no patch."""
    if not all(grid_of(arch)):
        raise ValueError(f"arch['image_size']={arch['image_size']!r} is smaller than a patch of "
                         f"{arch['patch_size']} pixels")


def count_blocks(names: Iterable[str]) -> int:
    return len({m[1] for name in names if (m := re.match(r'blocks\.(\d+)\.', name))})


def _check(arch: Mapping[str, Any]) -> None:
    check_grid(arch)
    if 'reduce' in arch and arch['mixer'] != 'bidirectional':
        raise ValueError("arch['reduce'] is of mixer='bidirectional' alone, got "
                         f"mixer={arch['mixer']!r}")


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Where the class tokens stand, and whether directions are added or averaged, leaves no
    trace."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    mixer = 'blocks.0.mixer.'
    dims, _, patch_size, _ = shapes['patch_embed.proj.weight']
    _, tokens, _ = shapes['pos_embed']
    num_frames, _, _ = shapes['temporal_embedding']
    inner, d_state = shapes[f'{mixer}A_log']
    _, rank = shapes[f'{mixer}dt_proj.weight']
    *_, width = shapes[f'{mixer}conv1d.weight']
    projected, _ = shapes[f'{mixer}in_proj.weight']
    if projected == 4 * inner:
        kind = 'decomposed'
    else:
        kind = 'scan_norm' if f'{mixer}norm.weight' in shapes else 'bidirectional'
    arch = dict(
        embed_dims=dims, depth=count_blocks(shapes), d_state=d_state, expand=inner / dims,
        mixer=kind, cls_token='frame', patch_size=patch_size,
        image_size=infer_image_size(tokens - 1, patch_size), num_frames=num_frames)
    if width != 4:
        arch['d_conv'] = width
    if rank != math.ceil(dims / 16):
        arch['dt_rank'] = rank
    return arch


FAMILY = Family(
    name='vivim', model='ViViM', system=SYSTEM, archs=ARCHS, rules=RULES, check=_check,
    keys=(('patch_embed.proj', 'patch_embed.proj'), ('pos_embed', 'pos_embed'),
          ('cls_token', 'cls_token'), ('temporal_embedding', 'temporal_embedding'),
          ('layers.#', 'blocks.#'), ('norm_f', 'norm')),
    head_keys=(('head', 'head.fc'), ('image_projection', 'head.proj')),
    signature=('blocks.0.mixer.A_log', 'blocks.0.mixer.D', 'blocks.0.mixer.in_proj.weight',
               'blocks.0.mixer.conv1d.weight', 'blocks.0.mixer.x_proj.weight',
               'blocks.0.mixer.dt_proj.weight', 'blocks.0.mixer.out_proj.weight',
               'blocks.0.norm.weight', 'temporal_embedding', 'cls_token', 'pos_embed',
               'patch_embed.proj.weight', 'norm.weight'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch,
    parity=PARITY, licence=LICENCE, url=URL)
