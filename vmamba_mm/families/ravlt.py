"""RAVLT (arXiv 2411.07635): the four published architectures and the names of its weights."""

from collections.abc import Callable, Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, are_ints, count_blocks, sizes_of_stages
from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Subject
from vmamba_mm.families.rmt import LAYER_SCALES_RULE, MLP_RATIOS_RULE, STEM_KEYS

_RATIOS = (3.5, 3.5, 3.5, 3.5)


def _arch(embed_dims: tuple[int, ...], depths: tuple[int, ...], num_heads: tuple[int, ...],
          **others: Any) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=_RATIOS,
                **others)


ARCHS = {
    'tiny': _arch((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8)),
    'small': _arch((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    'base': _arch((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8),
                  layer_scales=(1.0, 1.0, 1e-6, 1e-6)),
    'large': _arch((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10),
                   layer_scales=(1e-6, 1e-6, 1e-6, 1e-6)),
}
#: What the optional keys of an arch are where they are absent. The heads are those of
#: :func:`heads_of`.
DEFAULTS = dict(attentions=('linear', 'linear', 'softmax', 'softmax'),
                layer_scales=(1.0, 1.0, 1.0, 1.0))
_KINDS = 'linear', 'softmax'


def heads_of(arch: Mapping[str, Any]) -> tuple[int, ...]:
    """The heads of each stage: of at least 64 channels, unless the arch says others."""
    return tuple(arch.get('num_heads') or (max(1, dim // 64) for dim in arch['embed_dims']))


def attentions_of(arch: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The kind of attention of each block of each stage."""
    kinds = arch.get('attentions', DEFAULTS['attentions'])
    return [(kind,) * depth if isinstance(kind, str) else tuple(kind)
            for kind, depth in zip(kinds, arch['depths'], strict=True)]


def _are_kinds(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 4 and all(
        one in _KINDS if isinstance(one, str) else isinstance(one, tuple | list)
        and all(kind in _KINDS for kind in one) for one in value)


RULES = {
    'embed_dims': Rule(lambda v: are_ints(v, 4, 4) and all(one % 4 == 0 for one in v),
                       '4 multiples of 4'),
    'depths': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'num_heads': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1', optional=True),
    'mlp_ratios': MLP_RATIOS_RULE,
    'attentions': Rule(_are_kinds, "4 of 'linear' and 'softmax', or for one a sequence with "
                       'that of each block', optional=True),
    'layer_scales': LAYER_SCALES_RULE,
}


def _check(arch: Mapping[str, Any]) -> None:
    heads = heads_of(arch)
    for i, (dim, count) in enumerate(zip(arch['embed_dims'], heads, strict=True)):
        if dim % (4 * count):
            raise ValueError(f"arch['num_heads']={heads!r} must leave each head a multiple of 4 of "
                             f'the channels; stage {i} has {dim} for {count} heads')
        if int(dim * arch['mlp_ratios'][i]) < 1:
            raise ValueError(f"arch['mlp_ratios']={arch['mlp_ratios']!r} leaves the MLP of stage "
                             f'{i} no channel of {dim}')
    if [len(kinds) for kinds in attentions_of(arch)] != list(arch['depths']):
        raise ValueError(f"arch['attentions']={arch['attentions']!r} must have a kind for each of "
                         f"the {arch['depths']!r} blocks, or one for a stage")


# --- names of weights -------------------------------------------------------------------------

_TABLE = 'layers.#.RoPE.angle'
_BLOCK = (('norm1.norm', 'norm1'), ('norm2.norm', 'norm2'), ('ffn', 'mlp'),
          *((name, name) for name in ('pos', 'attn', 'gamma_1', 'gamma_2')))
_KEYS = (
    *STEM_KEYS, (_TABLE, None),
    *((f'layers.#.blocks.#.{theirs}', f'stages.#.blocks.#.{ours}') for theirs, ours in _BLOCK),
    ('layers.#.downsample.reduction', 'stages.#.downsample.conv'),
    ('layers.#.downsample.norm', 'stages.#.downsample.norm'), ('extra_norms.#.norm', 'norm#'))
#: The official linear layers are 1x1 convolutions, and the maps have their channels first.
_SHAPES = (
    (r'(?:attn\.qkvo|attn\.proj|mlp\.fc[12]|norm3\.proj|head\.fc)\.weight$', (None, None, 1, 1),
     (None, None)),
    (r'\.gamma_[12]$', (1, None, 1, 1), (1, 1, 1, None)))


def _angles(held: Any) -> Any:
    """By how much each channel of half a head turns from a row, or column, to the next."""
    if held.dim() != 1 or len(held) % 2:
        raise ValueError('it has not a number for each pair of channels')
    last = max(len(held) // 2 - 1, 1)
    return held.new_tensor([10000 ** (-(i // 2) / last) for i in range(len(held))])


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Which kind of attention a block has leaves no trace, nor do heads, and layer scales but in
    their values: they are taken to be those of the published arch of these shapes, or as there."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, hidden = (sizes_of_stages(shapes, f'blocks.0.{name}.weight', 4)
                    for name in ('norm1', 'mlp.fc1'))
    told = dict(embed_dims=dims, depths=count_blocks(shapes, 4),
                mlp_ratios=tuple(h / (dim or 1) for h, dim in zip(hidden, dims, strict=True)))
    scaled = tuple(f'stages.{i}.blocks.0.gamma_1' in shapes for i in range(4))
    if all(scaled):
        return dict(next((arch for arch in ARCHS.values() if told.items() <= arch.items()), told))
    return dict(told, layer_scales=tuple(float(there) for there in scaled))


# --- the official code's numbers ----------------------------------------------------------------

_KIND_OF = dict(l='linear', v='softmax')
#: Of each stage, as the published models leave them.
_FLAGS = ['l' * 10, 'l' * 10, 'v' * 20, 'v' * 10]


def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``RAVLT`` and ``GLTA``."""
    kwargs.ignore('drop_path_rate')
    starts = kwargs.get('layer_init_values', [1e-6] * 4)
    scaled, depths = kwargs.get('layerscales', [False] * 4), tuple(kwargs['depths'])
    return dict(
        embed_dims=tuple(kwargs['embed_dims']), depths=depths,
        num_heads=tuple(kwargs['num_heads']), mlp_ratios=tuple(kwargs['mlp_ratios']),
        # There are more flags than blocks.
        attentions=tuple(tuple(_KIND_OF[flag] for flag in flags[:depth]) for flags, depth in zip(
            kwargs.get('flagss', _FLAGS), depths, strict=True)),
        layer_scales=tuple(float(start) if there else 0.0
                           for start, there in zip(starts, scaled, strict=True)))


def _parity_subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    backbone = dict(arch=_parity_arch(kwargs), in_channels=kwargs.get('in_chans', 3))
    if options.require('kind', 'RAVLT', 'GLTA') == 'GLTA':
        kwargs.ignore('projection')  # which has none
        return Subject(Build('vmamba_mm.models:RAVLT', dict(
            backbone, out_indices=tuple(kwargs['out_indices']))), Call(view=list))
    backbone |= dict(out_indices=(3,), projection=kwargs['projection'])
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:RAVLT', backbone), num_classes=kwargs['num_classes'])),
        load=dict(weights='model_ema'))


def _parity_op(augmented: bool | None) -> Callable[[str, Options], Subject]:
    """An attention, and the tables of its rotation."""
    return lambda section, case: Subject(
        Build('vmamba_mm.testing:attend_map_by_head', dict(
            height=case['H'], width=case['W'], augmented=augmented)),
        Call(args=('q', 'k', 'v'), outputs=('y', 'cos', 'sin', 'angle')))


PARITY = Parity(
    subject=_parity_subject,
    ops={'op_rala.pt': _parity_op(augmented=True),
         'op_rope_attention.pt': _parity_op(augmented=None)},
    omissions=(Omission('grads.[qk]', 'of a single token: nothing but what the 1e-6 of the '
                        'denominator leaves of a difference', 'op_rala.pt', '2'),),
    absences=(Omission('grad_params', 'are stored of cases in eval mode alone', case='* train'),))

FAMILY = Family(
    name='ravlt', model='RAVLT', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS,
    # The projection of a classifier is the norm of its only output.
    classifier_keys=(('proj', 'norm3.proj'), ('norm', 'norm3.norm')),
    head_keys=(('head', 'head.fc'),),
    signature=('stages.0.blocks.0.attn.qkvo.weight', *(f'stages.0.blocks.0.{name}' for name in (
        'attn.lepe.weight', 'attn.proj.weight', 'pos.weight', 'norm1.bias', 'norm2.bias',
        'mlp.dwconv.weight', 'mlp.fc1.weight')), 'patch_embed.conv1.conv.weight'),
    first_convs=('patch_embed.conv1.conv.weight',), shapes=_SHAPES, tables=((_TABLE, _angles),),
    infer_arch=_infer_arch, parity=PARITY, licence='none stated',
    url='https://github.com/qhfan/RALA')
