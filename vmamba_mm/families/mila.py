"""MILA (arXiv 2405.16605): the three published architectures and the names of its weights.

The authors' code calls it MLLA.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, count_blocks, infer_image_size, is_int, is_number
from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Subject


def _arch(embed_dims: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, num_heads=num_heads)


ARCHS = {
    'tiny': _arch(64, (2, 4, 8, 4), (2, 4, 8, 16)),
    'small': _arch(64, (3, 6, 21, 6), (2, 4, 8, 16)),
    'base': _arch(96, (3, 6, 21, 6), (3, 6, 12, 24)),
}
#: What the optional keys of an arch are where they are absent, as published. The heads are those of
#: :func:`heads_of`.
DEFAULTS = dict(mlp_ratio=4.0, qkv_bias=True, image_size=0)


def heads_of(arch: Mapping[str, Any]) -> tuple[int, ...]:
    """The heads of each stage: of 32 channels as published, unless the arch says others."""
    dims = [arch['embed_dims'] * 2 ** i for i in range(len(arch['depths']))]
    return tuple(arch.get('num_heads') or (max(1, dim // 32) for dim in dims))


def grid_of(arch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the first map of the images that a position embedding is for."""
    size = arch['image_size']
    height, width = (size, size) if isinstance(size, int) else size
    return math.ceil(height / 4), math.ceil(width / 4)


def _are_ints(value: Any, low: int) -> bool:
    return (isinstance(value, tuple | list) and len(value) > 0
            and all(is_int(one, low) for one in value))


RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 4) and v % 4 == 0, 'a multiple of 4'),
    'depths': Rule(lambda v: _are_ints(v, 1), 'an int of at least 1 for each stage'),
    'num_heads': Rule(lambda v: _are_ints(v, 1), 'an int of at least 1 for each stage',
                      optional=True),
    'mlp_ratio': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'qkv_bias': Rule(lambda v: isinstance(v, bool), 'True or False', optional=True),
    'image_size': Rule(lambda v: is_int(v, 0) or _are_ints(v, 1) and len(v) == 2,
                       'a side of the images that a position embedding is for, or (height, width), '
                       'or 0 for no embedding', optional=True),
}


def _check(arch: Mapping[str, Any]) -> None:
    heads, ratio = heads_of(arch), arch.get('mlp_ratio', DEFAULTS['mlp_ratio'])
    if len(heads) != len(arch['depths']):
        raise ValueError(f"arch['num_heads']={arch['num_heads']!r} must have a number for each of "
                         f"the {len(arch['depths'])} stages of arch['depths']")
    for i, count in enumerate(heads):
        dim = arch['embed_dims'] * 2 ** i
        if dim % count:
            raise ValueError(f"arch['num_heads']={heads!r} must divide the channels of each stage; "
                             f'stage {i} has {dim} for {count} heads')
    if ratio * arch['embed_dims'] < 1:
        raise ValueError(f"arch['mlp_ratio']={ratio!r} leaves the MLP no channel of the "
                         f'{arch["embed_dims"]} of embed_dims')


# --- names of weights -------------------------------------------------------------------------

_TABLE = 'layers.#.blocks.#.attn.rope.rotations'
_KEYS = (
    ('patch_embed', 'patch_embed'), ('absolute_pos_embed', 'pos_embed'), (_TABLE, None),
    *((f'layers.#.blocks.#.{theirs}', f'stages.#.blocks.#.{ours}') for theirs, ours in (
        *((name, name) for name in ('cpe1', 'norm1', 'cpe2', 'norm2', 'mlp')),
        *((name, f'attn.{name}') for name in ('in_proj', 'act_proj', 'out_proj')),
        ('dwc', 'attn.conv2d'), ('attn.qk', 'attn.qk'), ('attn.lepe', 'attn.lepe'))),
    ('layers.#.downsample', 'stages.#.downsample'), ('norm#', 'norm#'))


def _classifier_keys(names: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The norm of a classifier is that of its last stage."""
    stages = [int(m[1]) for k in names if (m := re.match(r'(?:layers|stages)\.(\d+)\.', k))]
    return ('norm', f'norm{max(stages, default=len(ARCHS["tiny"]["depths"]) - 1)}'),


def _rotations(held: Any) -> Any:
    """Cosines and sines, (H, W, C / 2, 2), of the classifier's only image size: the first half of
    the pairs by rows, the second by columns."""
    if held.dim() != 4 or held.shape[2] % 2 or held.shape[3] != 2:
        raise ValueError('it has no cosine and sine for each pair of a multiple of 4 channels')
    height, width, pairs, _ = held.shape
    rates = held.new_tensor([10000 ** (-2 * i / pairs) for i in range(pairs // 2)])
    rows, columns = (held.new_tensor(range(size))[:, None] * rates for size in (height, width))
    angles = held.new_empty(height, width, pairs)
    angles[..., :pairs // 2], angles[..., pairs // 2:] = rows[:, None], columns
    table = held.new_empty(held.shape)
    table[..., 0], table[..., 1] = angles.cos(), angles.sin()
    return table


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Heads leave no trace, and are taken to be of 32 channels; nor does which side of an image of
    a position embedding is longer."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    first = 'stages.0.blocks.0.'
    dims, = shapes[f'{first}norm1.weight']
    hidden, _ = shapes[f'{first}mlp.fc1.weight']
    stages = max(int(m[1]) for k in shapes if (m := re.match(r'stages\.(\d+)\.', k))) + 1
    told = dict(embed_dims=dims, depths=count_blocks(shapes, stages))
    found = dict(mlp_ratio=hidden / dims, qkv_bias=f'{first}attn.qk.bias' in shapes)
    if 'pos_embed' in shapes:
        found |= dict(image_size=infer_image_size(shapes['pos_embed'][1], 4))
    found = {k: v for k, v in found.items() if v != DEFAULTS[k]}
    published = next((arch for arch in ARCHS.values() if told.items() <= arch.items()), told)
    return dict(published, **found)


# --- the official code's numbers ----------------------------------------------------------------

def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, or by its kind a backbone with a norm for each output."""
    kwargs = options['kwargs']
    kwargs.ignore('drop_path_rate')
    for key, value in dict(patch_size=4, drop_rate=0.0).items():
        kwargs.require(key, value)
    embedded, size = kwargs.get('ape', False), kwargs.get('img_size', 224)
    arch = dict(
        embed_dims=kwargs['embed_dim'], depths=tuple(kwargs['depths']),
        num_heads=tuple(kwargs['num_heads']), mlp_ratio=kwargs.get('mlp_ratio', 4.0),
        qkv_bias=kwargs.get('qkv_bias', True), image_size=size if embedded else 0)
    backbone = dict(arch=arch, in_channels=kwargs.get('in_chans', 3))
    if options.require('kind', 'MLLA', 'MLLA_dense') == 'MLLA_dense':
        return Subject(Build('vmamba_mm.models:MILA', dict(
            backbone, out_indices=tuple(kwargs['out_indices']))), Call(view=list))
    last = len(arch['depths']) - 1
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:MILA', dict(backbone, out_indices=(last,))),
        num_classes=kwargs['num_classes'])), load=dict(weights='model_ema'))


def _parity_op(section: str, case: Options) -> Subject:
    """The attention, and the table of its rotation."""
    return Subject(
        Build('vmamba_mm.testing:attend_map', dict(height=case['H'], width=case['W'])),
        Call(args=('q', 'k', 'v'), outputs=('y', 'rotations')))


PARITY = Parity(
    subject=_parity_subject, ops={'op_mila_attention.pt': _parity_op},
    absences=(Omission('grad_params', 'are stored of cases in eval mode alone', case='* train'),))

FAMILY = Family(
    name='mila', model='MILA', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS,
    classifier_keys=_classifier_keys, head_keys=(('head', 'head.fc'),),
    signature=('stages.0.blocks.0.attn.qk.weight', *(f'stages.0.blocks.0.{name}' for name in (
        'cpe1.weight', 'cpe2.weight', 'attn.in_proj.weight', 'attn.act_proj.weight',
        'attn.conv2d.weight', 'attn.lepe.weight', 'attn.out_proj.weight', 'norm1.weight',
        'mlp.fc1.weight')), 'patch_embed.conv1.conv.weight'),
    first_convs=('patch_embed.conv1.conv.weight',), tables=((_TABLE, _rotations),),
    infer_arch=_infer_arch, parity=PARITY, licence='MIT',
    url='https://github.com/LeapLabTHU/MLLA')
