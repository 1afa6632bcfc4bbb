"""VMamba (arXiv 2401.10166): its published architectures and the names of its weights."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vmamba_mm.families.base import (
    Family,
    Rows,
    Rule,
    are_ints,
    count_blocks,
    is_int,
    is_number,
    one_of,
)
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject


def _arch(embed_dims: int, depths: tuple[int, ...], *, vanilla: bool = False,
          ssm_ratio: float = 1.0) -> dict[str, Any]:
    return dict(
        embed_dims=embed_dims, depths=depths, d_state=16 if vanilla else 1, ssm_ratio=ssm_ratio,
        dt_rank='auto', conv_bias=vanilla, gate=vanilla, mlp_ratio=0.0 if vanilla else 4.0,
        stem='patch' if vanilla else 'conv', downsample='merge' if vanilla else 'conv',
        scan='cross')


def _m2(embed_dims: int, depths: tuple[int, ...]) -> dict[str, Any]:
    return dict(_arch(embed_dims, depths), d_state=64, core='ssd')


#: Published variants: s = ssm_ratio, l = blocks of the third stage (table 6). Those with Mamba-2's
#: operator, m2, are in the public code alone: no weights and no results of them were published.
ARCHS = {
    'vanilla_tiny': _arch(96, (2, 2, 9, 2), vanilla=True, ssm_ratio=2.0),
    'vanilla_small': _arch(96, (2, 2, 27, 2), vanilla=True, ssm_ratio=2.0),
    'vanilla_base': _arch(128, (2, 2, 27, 2), vanilla=True, ssm_ratio=2.0),
    'tiny_s2l5': _arch(96, (2, 2, 5, 2), ssm_ratio=2.0),
    'small_s2l15': _arch(96, (2, 2, 15, 2), ssm_ratio=2.0),
    'base_s2l15': _arch(128, (2, 2, 15, 2), ssm_ratio=2.0),
    'tiny_s1l8': _arch(96, (2, 2, 8, 2)),
    'small_s1l20': _arch(96, (2, 2, 20, 2)),
    'base_s1l20': _arch(128, (2, 2, 20, 2)),
    'tiny_m2': _m2(96, (2, 2, 4, 2)),
    'small_m2': _m2(96, (2, 2, 12, 2)),
    'base_m2': _m2(128, (2, 2, 12, 2)),
}


def stage_dims(embed_dims: int | Sequence[int]) -> tuple[int, ...]:
    """The channels of the 4 stages."""
    return tuple(embed_dims) if isinstance(embed_dims, Sequence) else tuple(
        embed_dims * 2 ** i for i in range(4))


_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False')
RULES = {
    'embed_dims': Rule(
        lambda v: (is_int(v, 2) or are_ints(v, 2, 4)) and all(c % 2 == 0 for c in stage_dims(v)),
        'an even int of at least 2, or 4 of them'),
    'depths': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'd_state': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'ssm_ratio': Rule(lambda v: is_number(v) and v > 0, 'a number above 0'),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1"),
    'conv_bias': _BOOL,
    'gate': _BOOL,
    'mlp_ratio': Rule(lambda v: is_number(v, 0), 'a number of at least 0 (0: no MLP)'),
    'stem': one_of('patch', 'conv'),
    'downsample': one_of('merge', 'conv'),
    # Which names there are, the ops know, as others may register theirs: SS2D asks them.
    'scan': Rule(lambda v: isinstance(v, str), "a str, such as 'cross'"),
    # The defaults of SS2D, and of SSD2D, are what is published.
    'act': one_of('silu', 'gelu', 'relu').or_absent(),
    'conv_kernel': Rule(lambda v: is_int(v, 0) and (v == 0 or v % 2 == 1 and v > 1),
                        '0 (no convolution) or an odd int of at least 3', optional=True),
    'ssm_init': one_of('mamba', 'random', 'zero').or_absent(),
    'core': one_of('s6', 'ssd').or_absent(),
    'gate_act': _BOOL.or_absent(),
    'out_norm': one_of('ln', 'none', 'dwconv', 'ln_dwconv', 'softmax', 'sigmoid').or_absent(),
    'out_act': _BOOL.or_absent(),
}
_SSD_KEYS = ('gate_act', 'out_norm', 'out_act')


def _check(arch: Mapping[str, Any]) -> None:
    dims = stage_dims(arch['embed_dims'])
    fewest = min(dims)
    for key, part in (('ssm_ratio', 'SS2D'), ('mlp_ratio', 'the MLP')):
        if 0 < arch[key] and int(arch[key] * fewest) == 0:
            zero = ', or 0 for no MLP' if key == 'mlp_ratio' else ''
            raise ValueError(f'arch[{key!r}]={arch[key]!r} leaves {part} no channel of the '
                             f'{fewest} of embed_dims; it must be at least 1/{fewest}{zero}')
    if arch.get('core', 's6') == 's6':
        for key in _SSD_KEYS:
            if key in arch:
                raise ValueError(f"arch[{key!r}] is a key of core='ssd' alone; leave it out, or "
                                 "say core='ssd'")
        return
    if arch['scan'] != 'cross':
        raise ValueError(f"arch['scan']={arch['scan']!r} is not allowed with core='ssd', which "
                         "knows 'cross' alone")
    for dim in dims:
        inner = int(arch['ssm_ratio'] * dim)
        heads = math.ceil(dim / 16) if arch['dt_rank'] == 'auto' else arch['dt_rank']
        if inner % heads:
            raise ValueError(f"arch['dt_rank']={arch['dt_rank']!r} is the number of heads with "
                             f"core='ssd', and its {heads} in the stage of {dim} channels must "
                             f'divide the {inner} of SSD2D (ssm_ratio * {dim})')


# --- names of weights -------------------------------------------------------------------------

# There are two generations of official names. Where both have a name for the same weight, the
# newer one, of 2024-02-18 and later, stands first; the older one is read as well.
_BLOCKS = (
    ('layers.#.blocks.#.norm', 'stages.#.blocks.#.norm1'),
    ('layers.#.blocks.#.ln_1', 'stages.#.blocks.#.norm1'),
    ('layers.#.blocks.#.op', 'stages.#.blocks.#.ssm'),
    ('layers.#.blocks.#.self_attention', 'stages.#.blocks.#.ssm'),
    ('layers.#.blocks.#.norm2', 'stages.#.blocks.#.norm2'),
    ('layers.#.blocks.#.mlp', 'stages.#.blocks.#.mlp'),
)
_STEMS = {
    'patch': (('patch_embed.0', 'patch_embed.proj'), ('patch_embed.2', 'patch_embed.norm'),
              ('patch_embed.proj', 'patch_embed.proj'), ('patch_embed.norm', 'patch_embed.norm')),
    'conv': (('patch_embed.0', 'patch_embed.conv1'), ('patch_embed.2', 'patch_embed.norm1'),
             ('patch_embed.proj', 'patch_embed.conv1'), ('patch_embed.norm', 'patch_embed.norm1'),
             ('patch_embed.5', 'patch_embed.conv2'), ('patch_embed.7', 'patch_embed.norm2')),
}
_DOWNSAMPLES = {
    'merge': (('layers.#.downsample.norm', 'stages.#.downsample.norm'),
              ('layers.#.downsample.reduction', 'stages.#.downsample.reduction')),
    'conv': (('layers.#.downsample.1', 'stages.#.downsample.conv'),
             ('layers.#.downsample.3', 'stages.#.downsample.norm')),
}
_OUT_NORMS = (('outnorm#', 'norm#'),)


def _keys(names: Collection[str]) -> Rows:
    is_conv = any(k.startswith(('patch_embed.5.', 'patch_embed.conv1.')) for k in names)
    is_merge = any('.downsample.reduction.' in k for k in names)
    return (_BLOCKS + _STEMS['conv' if is_conv else 'patch']
            + _DOWNSAMPLES['merge' if is_merge else 'conv'] + _OUT_NORMS)


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The scan order, activations and the initialisation leave no trace, nor do norms that have no
    weights."""
    return infer_arch(weights, 4)


def infer_arch(weights: Mapping[str, Any], num_routes: int) -> dict[str, Any]:
    """The arch of VMamba's stages with so many routes; ``scan`` is 'cross' whatever they are.

    Raises:
        KeyError, ValueError: as ``Family.infer_arch``.
    """
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    first = 'stages.0.blocks.0.'
    dim, *_ = shapes[f'{first}norm1.weight']
    if (Ds := f'{first}ssm.Ds') in shapes:
        is_ssd = len(shapes[Ds]) == 3
    else:
        is_ssd = f'{first}ssm.dt_projs_weight' not in shapes
    # Half a file is told as well, so that a message can say what it holds.
    dims = tuple(shapes.get(f'stages.{i}.blocks.0.norm1.weight', (usual,))[0]
                 for i, usual in enumerate(stage_dims(dim)))
    if not is_ssd and (found := shapes[f'{first}ssm.x_proj_weight'][0]) != num_routes:
        raise ValueError(f'{found} routes in place of {num_routes}')
    projected, *_ = shapes[f'{first}ssm.in_proj.weight']
    hidden, *_ = shapes.get(f'{first}mlp.fc1.weight', (0,))
    inner, rank, d_state = (_ssd_sizes if is_ssd else _s6_sizes)(shapes, first)
    conv = f'{first}ssm.conv2d.1' if is_ssd else f'{first}ssm.conv2d'
    *_, kernel = shapes.get(f'{conv}.weight', (0,))
    arch = dict(
        embed_dims=dim if dims == stage_dims(dim) else dims,
        depths=count_blocks(shapes, 4), d_state=d_state, ssm_ratio=inner / dim,
        dt_rank='auto' if rank == math.ceil(dim / 16) else rank,
        conv_bias=f'{conv}.bias' in shapes, gate=projected == 2 * inner,
        mlp_ratio=hidden / dim, stem='conv' if 'patch_embed.conv1.weight' in shapes else 'patch',
        downsample='merge' if 'stages.0.downsample.reduction.weight' in shapes else 'conv',
        scan='cross')
    if is_ssd:
        arch['core'] = 'ssd'
        names = {k.rpartition('.out_norm.')[2] for k in shapes if f'{first}ssm.out_norm.' in k}
        if names != {'weight', 'bias'}:
            arch['out_norm'] = next((kind for kind, name in _OUT_NORM_WEIGHTS if name in names),
                                    'none')
    return arch if kernel == 3 else dict(arch, conv_kernel=kernel)


#: A weight that tells SSD2D's norm.
_OUT_NORM_WEIGHTS = ('ln_dwconv', '2.weight'), ('dwconv', '1.weight')


def _s6_sizes(shapes: Mapping[str, tuple[int, ...]], first: str) -> tuple[int, int, int]:
    """Inner channels, dt_rank and d_state of SS2D, which has these two weights in every stage."""
    stages = {k.partition('.blocks.')[0] for k in shapes
              if k.startswith('stages.') and '.blocks.' in k}
    for name in (f'{stage}.blocks.0.ssm.{name}' for stage in sorted(stages)
                 for name in ('dt_projs_weight', 'out_norm.weight')):
        if name not in shapes:
            raise KeyError(name)
    _, inner, rank = shapes[f'{first}ssm.dt_projs_weight']
    _, d_state = shapes[f'{first}ssm.A_logs']
    return inner, rank, d_state


def _ssd_sizes(shapes: Mapping[str, tuple[int, ...]], first: str) -> tuple[int, int, int]:
    """The same of SSD2D, whose dt_rank is its number of heads."""
    _, heads, head_dim = shapes[f'{first}ssm.Ds']
    _, projected, inner = shapes[f'{first}ssm.x_proj_weight']
    if heads * head_dim != inner:
        raise ValueError('heads and channels differ')
    return inner, heads, (projected - heads) // 2


# --- the official code's numbers ----------------------------------------------------------------

_STEM_VERSIONS = {'v1': 'patch', 'v2': 'conv'}
_DOWNSAMPLE_VERSIONS = {'v1': 'merge', 'v2': 'merge', 'v3': 'conv'}
#: The official ``forward_type`` without its suffix. Those of one order differ in how they compute.
_SCAN_VERSIONS = {**dict.fromkeys(('v0', 'v01', 'v02', 'v03', 'v04', 'v05', 'v2', 'v3'), 'cross'),
                  'v051d': 'unidirectional', 'v052d': 'bidirectional', 'v052dc': 'cascade'}


#: The official ``forward_type`` of Mamba-2's operator.
_SSD_TYPE = re.compile(r'm0(?:_on(none|dwconv3|cnorm|softmax|sigmoid))?'
                       r'(_nozact)?(_noz)?(_oact)?(?:_no32)?')
_SSD_OUT_NORMS = {None: 'ln', 'none': 'none', 'dwconv3': 'dwconv', 'cnorm': 'ln_dwconv',
                  'softmax': 'softmax', 'sigmoid': 'sigmoid'}


def _ssd_options(kwargs: Options) -> dict[str, Any]:
    """What ``forward_type`` says of an operator m0."""
    match = _SSD_TYPE.fullmatch(kwargs['forward_type'])
    if match is None:
        raise ValueError(f'forward_type={kwargs["forward_type"]!r} has no counterpart here, only '
                         f'{_SSD_TYPE.pattern}')
    norm, no_gate_act, no_gate, out_act = match.groups()
    return dict(gate=not no_gate, gate_act=not no_gate_act, out_norm=_SSD_OUT_NORMS[norm],
                out_act=bool(out_act))


def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VSSM``."""
    for key, value in dict(patch_size=4, patch_norm=True, gmlp=False, posembed=False,
                           mlp_act_layer='gelu').items():
        kwargs.require(key, value)
    kwargs.require('norm_layer', 'ln', 'ln2d')  # of the same values in another memory format
    kwargs.ignore('drop_path_rate', 'ssm_drop_rate', 'mlp_drop_rate', 'ssm_init', 'use_checkpoint',
                  'imgsize')
    stem = kwargs.require('patchembed_version', *_STEM_VERSIONS)
    downsample = kwargs.require('downsample_version', *_DOWNSAMPLE_VERSIONS)
    if kwargs['forward_type'].startswith('m'):
        core = dict(_ssd_options(kwargs), core='ssd', scan='cross')
    else:
        scan = kwargs.require('forward_type', *(f'{version}{suffix}' for version in _SCAN_VERSIONS
                                                for suffix in ('', '_noz')))
        core = dict(gate=not scan.endswith('_noz'),
                    scan=_SCAN_VERSIONS[scan.removesuffix('_noz')])
    dims = kwargs['dims']
    return dict(embed_dims=dims if isinstance(dims, int) else tuple(dims),
                depths=tuple(kwargs['depths']),
                d_state=kwargs['ssm_d_state'], ssm_ratio=kwargs['ssm_ratio'],
                dt_rank=kwargs['ssm_dt_rank'], conv_bias=kwargs['ssm_conv_bias'],
                mlp_ratio=kwargs['mlp_ratio'], stem=_STEM_VERSIONS[stem],
                downsample=_DOWNSAMPLE_VERSIONS[downsample], act=kwargs['ssm_act_layer'],
                conv_kernel=_kernel(kwargs['ssm_conv']), **core)


def _kernel(size: int) -> int:
    return 0 if size < 2 else size


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, NAME.cls.pth, or the same backbone with a norm for each output."""
    options.ignore('kind')
    kwargs = options['kwargs']
    arguments = dict(arch=_parity_arch(kwargs), in_channels=kwargs['in_chans'])
    num_classes = kwargs['num_classes']
    if file.endswith('.dense.pth'):
        return Subject(Build('vmamba_mm.models:VMamba', arguments), Call(outputs=('feats',)))
    backbone = Build('vmamba_mm.models:VMamba', dict(arguments, out_indices=(3,)))
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=backbone, num_classes=num_classes)), Call(outputs=('logits',)))


def _parity_m2_subject(file: str, options: Options) -> Subject:
    """A classifier, the backbone with a norm for each output, or an operator alone."""
    kwargs = options['kwargs']
    if 'd_model' in kwargs:
        kwargs.require('with_initial_state', False)
        kwargs.ignore('initialize')
        arguments = dict(
            dim=kwargs['d_model'], d_state=kwargs['d_state'], ssm_ratio=kwargs['ssm_ratio'],
            dt_rank=kwargs['dt_rank'], conv_bias=kwargs['conv_bias'], act=kwargs['act'],
            conv_kernel=_kernel(kwargs['d_conv']), **_ssd_options(kwargs))
        return Subject(Build('vmamba_mm.layers:SSD2D', arguments), convert=dict)
    arguments = dict(arch=_parity_arch(kwargs), in_channels=kwargs['in_chans'])
    num_classes = kwargs['num_classes']
    if 'out_indices' in kwargs:
        return Subject(Build('vmamba_mm.models:VMamba', dict(
            arguments, out_indices=tuple(kwargs['out_indices']))))
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:VMamba', dict(arguments, out_indices=(3,))),
        num_classes=num_classes)))


def _parity_scan(section: str, case: Options) -> Subject:
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
    return Subject(Build('vmamba_mm.ops:selective_scan', dict(delta_softplus=True)),
                   Call(args=(), kwargs={name: name for name in names}, outputs=('y',)))


_CLS_NUMBERS = 'belongs to the classifier, NAME.cls.pth'
PARITY = Parity(
    subject=_parity_subject, ops={'selective_scan.pt': _parity_scan},
    checkpoints=('.cls.pth', '.dense.pth'),
    omissions=(Omission('feats', 'is of the backbone with norms, NAME.dense.pth', '*.cls.pth'),
               Omission('logits', _CLS_NUMBERS, '*.dense.pth'),
               Omission('grad_*', _CLS_NUMBERS, '*.dense.pth')),
    limits=(Limit('y', 1e-6, 'stored in fp32', 'selective_scan.pt'),
            Limit('grads.*', 1e-5, 'stored in fp32', 'selective_scan.pt')))

FAMILY = Family(
    name='vmamba', model='VMamba', archs=ARCHS, rules=RULES, check=_check,
    # The norm of a classifier is that of its only output.
    keys=_keys, classifier_keys=(('classifier.norm', 'norm3'), ('norm', 'norm3')),
    head_keys=(('classifier.head', 'head.fc'), ('head', 'head.fc')),
    signature=('stages.0.blocks.0.ssm.A_logs', 'stages.0.blocks.0.norm1.weight',
               *(f'stages.{i}.blocks.0.ssm.{name}' for i in range(4) for name in (
                   'in_proj.weight', 'x_proj_weight', 'dt_projs_bias', 'A_logs', 'Ds',
                   'out_proj.weight')),
               *(f'stages.{i}.downsample.norm.weight' for i in range(3))),
    linear=r'\.(in_proj|out_proj|fc1|fc2|reduction|head|fc)\.weight$',
    first_convs=('patch_embed.conv1.weight', 'patch_embed.proj.weight'),
    infer_arch=_infer_arch,
    parity=PARITY, parity_folders={'vmamba_m2': Parity(subject=_parity_m2_subject)},
    licence='MIT', url='https://github.com/MzeroMiko/VMamba')
