"""VSSD (arXiv 2407.18559): the four published architectures and the names of its weights."""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, are_ints, count_blocks, is_int, is_number, one_of
from vmamba_mm.families.parity import Build, Call, Limit, Options, Parity, Subject


def _arch(embed_dims: int, depths: tuple[int, ...], num_heads: tuple[int, ...], d_state: int
          ) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, num_heads=num_heads, d_state=d_state)


ARCHS = {
    'micro': _arch(48, (2, 2, 8, 4), (2, 4, 8, 16), 48),
    'tiny': _arch(64, (2, 4, 8, 4), (2, 4, 8, 16), 64),
    'small': _arch(64, (3, 4, 21, 5), (2, 4, 8, 16), 64),
    'base': _arch(96, (3, 4, 21, 5), (3, 6, 12, 24), 64),
}
#: What the optional keys of an arch are where they are absent, as published.
DEFAULTS = dict(mixers=('ssd', 'ssd', 'ssd', 'attention'), expand=2.0, mlp_ratio=4.0, n_groups=1,
                positive=True, stem='residual', downsample='inverted')

_COUNT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_MIXERS = 'ssd', 'attention'
RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 2) and v % 2 == 0, 'an even int of at least 2'),
    'depths': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'num_heads': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'd_state': _COUNT,
    'mixers': Rule(lambda v: isinstance(v, tuple | list) and len(v) == 4 and v[0] == 'ssd'
                   and all(one in _MIXERS for one in v),
                   "4 of 'ssd' and 'attention', the first of them 'ssd'", optional=True),
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'mlp_ratio': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'n_groups': _COUNT.or_absent(),
    'positive': Rule(lambda v: isinstance(v, bool), 'True or False', optional=True),
    'stem': one_of('residual', 'patch').or_absent(),
    'downsample': one_of('inverted', 'conv').or_absent(),
}


def _check(arch: Mapping[str, Any]) -> None:
    arch = {**DEFAULTS, **arch}
    for i, (heads, mixer) in enumerate(zip(arch['num_heads'], arch['mixers'], strict=True)):
        dim = arch['embed_dims'] * 2 ** i
        inner = dim * arch['expand'] if mixer == 'ssd' else dim
        if inner < heads or inner % heads:
            raise ValueError(f"arch['num_heads']={arch['num_heads']!r} must divide the channels of "
                             f'each mixer; stage {i} has {inner:g} for {heads} heads')
        if mixer == 'ssd' and heads % arch['n_groups']:
            raise ValueError(f"arch['n_groups']={arch['n_groups']} must divide the heads of each "
                             f"SSD; stage {i} has {heads}")
    if arch['mlp_ratio'] * arch['embed_dims'] < 1:
        raise ValueError(f"arch['mlp_ratio']={arch['mlp_ratio']!r} leaves the MLP no channel of "
                         f'the {arch["embed_dims"]} of embed_dims; it must be at least '
                         f'1/{arch["embed_dims"]}')


# --- names of weights -------------------------------------------------------------------------

_KEYS = (
    ('patch_embed', 'patch_embed'),
    ('layers.#.blocks.#.attn.to_qkv', 'stages.#.blocks.#.attn.qkv'),
    ('layers.#.blocks.#.attn.to_out', 'stages.#.blocks.#.attn.proj'),
    *((f'layers.#.blocks.#.{name}', f'stages.#.blocks.#.{name}')
      for name in ('cpe1', 'norm1', 'attn', 'cpe2', 'norm2', 'mlp')),
    ('layers.#.downsample', 'stages.#.downsample'), ('outnorm#', 'norm#'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The heads of attention leave no trace, and are taken to be twice those of the stage before;
    nor do groups, whose states lie side by side like a larger one, and the sign of the weights."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    first = 'stages.0.blocks.0.'
    dims, = shapes[f'{first}norm1.weight']
    inner, = shapes[f'{first}attn.norm.weight']
    hidden, _ = shapes[f'{first}mlp.fc1.weight']
    conv, *_ = shapes[f'{first}attn.conv2d.weight']
    heads, mixers = [], []
    for i in range(4):
        place = f'stages.{i}.blocks.0.attn.'
        mixers.append('ssd' if f'{place}A_log' in shapes else 'attention')
        heads.append(shapes[f'{place}A_log'][0] if mixers[-1] == 'ssd' else 2 * heads[-1])
    if (conv - inner) % 2:
        raise ValueError(f'{conv} channels of the convolution for {inner} of x')
    arch = dict(embed_dims=dims, depths=count_blocks(shapes, 4), num_heads=tuple(heads),
                d_state=(conv - inner) // 2)
    found = dict(
        mixers=tuple(mixers), expand=inner / dims, mlp_ratio=hidden / dims,
        stem='residual' if 'patch_embed.conv2.0.conv.weight' in shapes else 'patch',
        downsample='inverted' if 'stages.0.downsample.conv.1.conv.weight' in shapes else 'conv')
    return arch | {k: v for k, v in found.items() if v != DEFAULTS[k]}


# --- the official code's numbers ----------------------------------------------------------------

_MIXER_TYPES = {'mamba2': 'ssd', 'standard': 'attention'}


def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VMAMBA2``."""
    for key, value in dict(linear_attn_duality=True, bidirection=False, lepe=False).items():
        kwargs.require(key, value)
    kwargs.ignore('ssd_chunk_size', 'drop_path_rate')  # of the causal SSD, and of training
    types = kwargs.get('attn_types', ('mamba2', 'mamba2', 'mamba2', 'standard'))
    return dict(
        embed_dims=kwargs['embed_dim'], depths=tuple(kwargs['depths']),
        num_heads=tuple(kwargs['num_heads']), d_state=kwargs['d_state'],
        mixers=tuple(_MIXER_TYPES[one] for one in types),
        expand=float(kwargs['ssd_expansion']), mlp_ratio=kwargs['mlp_ratio'],
        n_groups=kwargs['ssd_ngroups'], positive=kwargs['ssd_positve_dA'],
        stem='patch' if kwargs['simple_patch_embed'] else 'residual',
        downsample='conv' if kwargs['simple_downsample'] else 'inverted')


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, NAME.pth, or by its arguments a backbone with a norm for each output."""
    kwargs = options['kwargs']
    backbone = dict(arch=_parity_arch(kwargs))
    num_classes = kwargs['num_classes']
    if 'out_indices' in kwargs:
        return Subject(Build('vmamba_mm.models:VSSD', dict(
            backbone, out_indices=tuple(kwargs['out_indices']))), Call(view=list))
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:VSSD', dict(backbone, out_indices=(3,))),
        num_classes=num_classes)), load=dict(weights='model_ema'))


def _parity_op(section: str, case: Options) -> Subject:
    return Subject(
        Build('vmamba_mm.ops:nc_ssd', dict(positive=case['positive_dA'])),
        Call(args=('x', 'dt', 'A', 'B', 'C', 'D'), outputs=('y',)))


PARITY = Parity(
    subject=_parity_subject, ops={'op_nc_ssd.pt': _parity_op},
    limits=(Limit('grad_params.layers.0.*', 1e-3, 'ill-conditioned, through norms of 4 channels: '
                  'the stored gradients, of fp32, are up to 1.6e-4 off those of fp64'),))

FAMILY = Family(
    name='vssd', model='VSSD', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS,
    # The norm of a classifier is that of its only output.
    classifier_keys=(('norm', 'norm3'),), head_keys=(('head', 'head.fc'),),
    signature=('stages.0.blocks.0.attn.A_log', *(f'stages.0.blocks.0.{name}' for name in (
        'cpe1.weight', 'cpe2.weight', 'attn.dt_bias', 'attn.D', 'attn.in_proj.weight',
        'attn.conv2d.weight', 'attn.norm.weight', 'attn.norm.bias', 'attn.out_proj.weight',
        'mlp.fc1.weight')), 'patch_embed.conv1.conv.weight'),
    first_convs=('patch_embed.conv1.conv.weight',), infer_arch=_infer_arch, parity=PARITY,
    licence='none stated', url='https://github.com/YuHengsss/VSSD')
