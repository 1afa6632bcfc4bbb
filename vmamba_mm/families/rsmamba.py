"""RSMamba (arXiv 2403.19654): its published architectures and the names of its weights."""

import math
from collections.abc import Mapping
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
from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Subject
from vmamba_mm.families.vivim import count_blocks

#: By name, the paths over the tokens and whether a gate weights them, or their mean is taken.
PATHS = {'forward': (1, False), 'forward_reverse_mean': (2, False),
         'forward_reverse_gate': (2, True), 'forward_reverse_shuffle_mean': (3, False),
         'forward_reverse_shuffle_gate': (3, True)}


def _arch(embed_dims: int, depth: int) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depth=depth, d_state=16, expand=2.0,
                path_type='forward_reverse_shuffle_gate', cls_token='none', patch_size=16,
                stride=8, image_size=224)


#: 'small' is in the public code alone: no results of it were published.
ARCHS = {'base': _arch(192, 24), 'large': _arch(256, 36), 'huge': _arch(320, 48),
         'small': _arch(192, 16)}

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': _INT, 'depth': _INT, 'd_state': _INT,
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0'),
    'path_type': one_of(*PATHS),
    'cls_token': one_of('none', 'head', 'middle', 'tail'),
    'patch_size': _INT, 'stride': _INT,
    'image_size': Rule(lambda v: is_int(v, 1) or are_ints(v, 1, 2),
                       'an int of at least 1, or two of them, height and width'),
    # What is published if an arch says nothing.
    'pos_embed': one_of('learnable', 'sine', 'none').or_absent(),
    'final_norm': Rule(lambda v: isinstance(v, bool), 'True or False', optional=True),
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
}


def grid_of(arch: Mapping[str, Any]) -> tuple[int, int]:
    """The patches of an image of ``image_size``, in rows and columns."""
    size = arch['image_size']
    height, width = (size, size) if isinstance(size, int) else size
    return -(-height // arch['stride']), -(-width // arch['stride'])


def _check(arch: Mapping[str, Any]) -> None:
    if arch['stride'] > arch['patch_size']:
        raise ValueError(f"arch['stride']={arch['stride']!r} must be at most patch_size, "
                         f"{arch['patch_size']}")
    if arch.get('pos_embed') == 'sine' and (arch['embed_dims'] % 4 or arch['cls_token'] != 'none'):
        raise ValueError("arch['pos_embed']='sine' needs embed_dims that are a multiple of 4, and "
                         'has no row for a class token')


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What leaves no trace: where the class token stands ('middle', the best of the paper), the
    pixels from patch to patch (half a patch), paths without a gate ('forward') and a sine embedding
    ('none')."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    mixer = 'blocks.0.mixer.'
    dims, _, patch_size, _ = shapes['patch_embed.proj.weight']
    inner, d_state = shapes[f'{mixer}A_log']
    _, rank = shapes[f'{mixer}dt_proj.weight']
    *_, width = shapes[f'{mixer}conv1d.weight']
    paths, _ = shapes.get(f'{mixer}gate.weight', (1, 0))
    stride = max(1, patch_size // 2)
    arch = dict(
        embed_dims=dims, depth=count_blocks(shapes), d_state=d_state, expand=inner / dims,
        path_type=next(name for name, kind in PATHS.items() if kind == (paths, paths > 1)),
        cls_token='middle' if 'cls_token' in shapes else 'none', patch_size=patch_size,
        stride=stride, image_size=224)
    if 'pos_embed' in shapes:
        _, tokens, _ = shapes['pos_embed']
        arch['image_size'] = infer_image_size(tokens - ('cls_token' in shapes), stride)
    else:
        arch['pos_embed'] = 'none'
    if 'norm.weight' not in shapes:
        arch['final_norm'] = False
    if width != 4:
        arch['d_conv'] = width
    if rank != math.ceil(dims / 16):
        arch['dt_rank'] = rank
    return arch


# --- the official code's numbers ----------------------------------------------------------------

_SIZES = {'s': 'small', 'b': 'base', 'l': 'large', 'h': 'huge'}


def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``RSMamba``."""
    kwargs.ignore('drop_rate', 'init_cfg')
    given = kwargs['arch']
    if isinstance(given, str):
        published = ARCHS[_SIZES[given]]
        sizes = {key: published[key] for key in ('embed_dims', 'depth', 'expand')}
    else:
        dims = given['embed_dims']
        sizes = dict(embed_dims=dims, depth=given['num_layers'],
                     expand=given['feedforward_channels'] / dims)
    size, patch_size = kwargs.get('img_size', 224), kwargs.get('patch_size', 16)
    return dict(
        sizes, d_state=16, path_type=kwargs['path_type'],
        cls_token=kwargs.get('cls_position', 'none'), patch_size=patch_size,
        stride=(kwargs.get('patch_cfg') or {}).get('stride', patch_size),
        image_size=size if isinstance(size, int) else tuple(size),
        pos_embed=kwargs.get('pe_type', 'learnable'), final_norm=kwargs.get('final_norm', True))


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, with what its backbone returns."""
    kwargs = options['kwargs']
    arch = _parity_arch(kwargs)
    indices = kwargs.get('out_indices', -1)
    indices = [indices] if isinstance(indices, int) else indices
    backbone = Build('vmamba_mm.models:RSMamba', dict(
        arch=arch, in_channels=kwargs.get('in_channels', 3), out_type=kwargs['out_type'],
        out_indices=tuple(i % arch['depth'] for i in indices)))
    return Subject(
        Build('vmamba_mm.testing:Classifier', dict(
            backbone=backbone, num_classes=kwargs['num_classes'])),
        Call(kwargs={'perms': 'permutations'},
             run='vmamba_mm.testing:run_with_permutations'))


def _parity_block(section: str, case: Options) -> Subject:
    """One block and the norm before it."""
    dims = case['d']
    paths, gated = PATHS[case['path_type']]
    case.ignore('perm')
    return Subject(
        Build('vmamba_mm.testing:BlockAndNorm', dict(
            block=Build('vmamba_mm.models.rsmamba:RSMambaBlock', dict(
                mixer=Build('vmamba_mm.layers:MultiPathMixer', dict(
                    embed_dims=dims, expand=case['intermediate'] / dims, paths=paths,
                    gated=gated)))),
            norm=Build('vmamba_mm.layers:LayerNorm', dict(dim=dims, eps=1e-6)))),
        Call(kwargs={'perm': 'permutation'}), convert=_convert_block, state='state_dict')


def _convert_block(state: Mapping[str, Any]) -> dict[str, Any]:
    places = {'layers.0': 'block.mixer', 'gate_layers.0.0': 'block.mixer.gate', 'pre_norm': 'norm'}
    return {f'{ours}{key.removeprefix(theirs)}': value for key, value in state.items()
            for theirs, ours in places.items() if key.startswith(f'{theirs}.')}


PARITY = Parity(
    subject=_parity_subject, ops={'op_block.pt': _parity_block},
    omissions=(Omission('perm_seed', 'the permutations that it gives are passed on'),))

_MIXER = ('A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight',
          'dt_proj.weight', 'dt_proj.bias', 'out_proj.weight')
FAMILY = Family(
    name='rsmamba', model='RSMamba', archs=ARCHS, rules=RULES, check=_check,
    keys=(('patch_embed.projection', 'patch_embed.proj'), ('pos_embed', 'pos_embed'),
          ('cls_token', 'cls_token'), ('gate_layers.#.0', 'blocks.#.mixer.gate'),
          ('layers.#', 'blocks.#.mixer'), ('pre_norm', 'pre_norm'), ('ln1', 'norm'),
          ('ln2', 'pool_norm')),
    head_keys=(('head.fc', 'head.fc'),), place='backbone.',
    signature=('blocks.0.mixer.A_log', 'pre_norm.weight', 'pre_norm.bias',
               *(f'blocks.0.mixer.{name}' for name in _MIXER if name != 'A_log'),
               'patch_embed.proj.weight'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, weights_key='state_dict',
    parity=PARITY, licence='Apache-2.0', url='https://github.com/KyanChen/RSMamba')
