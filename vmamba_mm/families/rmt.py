"""RMT (arXiv 2309.11523): the four published architectures and the names of its weights."""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, are_ints, count_blocks, is_number, sizes_of_stages
from vmamba_mm.families.parity import Build, Call, Options, Parity, Subject


def _arch(embed_dims: tuple[int, ...], depths: tuple[int, ...], num_heads: tuple[int, ...],
          mlp_ratios: tuple[float, ...], **others: Any) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios,
                **others)


_LAST_STAGES = (0.0, 0.0, 1e-6, 1e-6)
ARCHS = {
    'tiny': _arch((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3.0, 3.0, 3.0, 3.0),
                  forms=('decomposed', 'decomposed', 'whole', 'whole')),
    'small': _arch((64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4.0, 4.0, 3.0, 3.0)),
    'base': _arch((80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4.0, 4.0, 3.0, 3.0),
                  heads_ranges=(5.0, 5.0, 6.0, 6.0), layer_scales=_LAST_STAGES),
    'large': _arch((112, 224, 448, 640), (4, 8, 25, 8), (7, 7, 14, 20), (4.0, 4.0, 3.0, 3.0),
                   heads_ranges=(6.0, 6.0, 6.0, 6.0), layer_scales=_LAST_STAGES),
}
#: What the optional keys of an arch are where they are absent.
DEFAULTS = dict(forms=('decomposed', 'decomposed', 'decomposed', 'whole'),
                init_values=(2.0, 2.0, 2.0, 2.0), heads_ranges=(4.0, 4.0, 6.0, 6.0),
                layer_scales=(0.0, 0.0, 0.0, 0.0))

_FORMS = 'decomposed', 'whole'


def _are_numbers(above: float, up_to: float = float('inf')) -> Rule:
    return Rule(lambda v: isinstance(v, tuple | list) and len(v) == 4
                and all(is_number(one) and above < one <= up_to for one in v),
                f'4 numbers above {above:g}')


MLP_RATIOS_RULE = _are_numbers(0)
LAYER_SCALES_RULE = Rule(lambda v: isinstance(v, tuple | list) and len(v) == 4
                         and all(is_number(one, 0) for one in v),
                         '4 numbers of at least 0, 0 for none').or_absent()
RULES = {
    'embed_dims': Rule(lambda v: are_ints(v, 2, 4) and v[0] % 2 == 0,
                       '4 ints of at least 2, the first of them even'),
    'depths': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'num_heads': Rule(lambda v: are_ints(v, 1, 4), '4 ints of at least 1'),
    'mlp_ratios': MLP_RATIOS_RULE,
    'forms': Rule(lambda v: isinstance(v, tuple | list) and len(v) == 4
                  and all(one in _FORMS for one in v), "4 of 'decomposed' and 'whole'",
                  optional=True),
    'init_values': _are_numbers(0).or_absent(),
    'heads_ranges': Rule(lambda v: isinstance(v, tuple | list) and len(v) == 4
                         and all(is_number(one, 0) for one in v),
                         '4 numbers of at least 0').or_absent(),
    'layer_scales': LAYER_SCALES_RULE,
}


def _check(arch: Mapping[str, Any]) -> None:
    for i, (dim, heads) in enumerate(zip(arch['embed_dims'], arch['num_heads'], strict=True)):
        if dim % (2 * heads):
            raise ValueError(f"arch['num_heads']={arch['num_heads']!r} must leave each head an "
                             f'even number of channels; stage {i} has {dim} for {heads} heads')
        if int(dim * arch['mlp_ratios'][i]) < 1:
            raise ValueError(f"arch['mlp_ratios']={arch['mlp_ratios']!r} leaves the MLP of stage "
                             f'{i} no channel of {dim}')


# --- names of weights -------------------------------------------------------------------------

_BLOCK = (('pos.conv', 'pos'), ('retention_layer_norm', 'norm1'),
          ('retention.lepe.conv', 'attn.lepe'),
          *((f'retention.{name}_proj', f'attn.{name}_proj') for name in ('q', 'k', 'v', 'out')),
          ('final_layer_norm', 'norm2'), ('ffn.dwconv.conv', 'mlp.dwconv'), ('ffn.fc1', 'mlp.fc1'),
          ('ffn.fc2', 'mlp.fc2'), ('gamma_1', 'gamma_1'), ('gamma_2', 'gamma_2'))
#: Of the stem, whose GELUs have numbers too.
STEM_KEYS = tuple((f'patch_embed.proj.{n}', f'patch_embed.conv{i + 1}.{part}')
                  for i in range(4) for n, part in ((3 * i, 'conv'), (3 * i + 1, 'norm')))
_KEYS = (
    *STEM_KEYS,
    ('layers.#.Relpos.decay', 'stages.#.decay'), ('layers.#.Relpos.angle', None),
    *((f'layers.#.blocks.#.{theirs}', f'stages.#.blocks.#.{ours}') for theirs, ours in _BLOCK),
    ('layers.#.downsample.reduction', 'stages.#.downsample.conv'),
    ('layers.#.downsample.norm', 'stages.#.downsample.norm'), ('extra_norms.#', 'norm#'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Which form the attention of a stage has leaves no trace, nor do decays and layer scales but
    in their values: they are taken to be those of the published arch of these shapes."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, heads, hidden = (sizes_of_stages(shapes, name, 4) for name in (
        'blocks.0.norm1.weight', 'decay', 'blocks.0.mlp.fc1.weight'))
    scaled = tuple(f'stages.{i}.blocks.0.gamma_1' in shapes for i in range(4))
    told = dict(embed_dims=dims, depths=count_blocks(shapes, 4), num_heads=heads,
                mlp_ratios=tuple(h / (dim or 1) for h, dim in zip(hidden, dims, strict=True)))
    for arch in ARCHS.values():
        scales = arch.get('layer_scales', DEFAULTS['layer_scales'])
        if told.items() <= arch.items() and scaled == tuple(map(bool, scales)):
            return dict(arch)
    if any(scaled):
        told['layer_scales'] = tuple(1e-6 if there else 0.0 for there in scaled)
    return told


# --- the official code's numbers ----------------------------------------------------------------

def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VisRetNet`` and ``RMT``."""
    kwargs.ignore('drop_path_rate')
    start = kwargs.get('layer_init_values', 1e-6)
    scaled = kwargs.get('layerscales', [False] * 4)
    return dict(
        embed_dims=tuple(kwargs['embed_dims']), depths=tuple(kwargs['depths']),
        num_heads=tuple(kwargs['num_heads']), mlp_ratios=tuple(kwargs['mlp_ratios']),
        init_values=tuple(kwargs['init_values']), heads_ranges=tuple(kwargs['heads_ranges']),
        forms=tuple('decomposed' if chunk else 'whole' for chunk in kwargs['chunkwise_recurrents']),
        layer_scales=tuple(start if there else 0.0 for there in scaled))


def _parity_subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    options.ignore('kind')
    backbone = dict(arch=_parity_arch(kwargs))
    if kwargs.require('type', 'VisRetNet', 'RMT') == 'RMT':
        return Subject(Build('vmamba_mm.models:RMT', dict(
            backbone, out_indices=tuple(kwargs['out_indices']))), Call(view=list))
    labels_tokens = kwargs.get('token_label', False)
    backbone |= dict(out_indices=(3,), projection=kwargs['projection'],
                     with_last_map=labels_tokens)
    num_classes = kwargs['num_classes']
    head = Build('vmamba_mm.heads:TokenLabelHead', dict(
        num_classes=num_classes, in_channels=kwargs['projection'],
        aux_channels=kwargs['embed_dims'][3])) if labels_tokens else None
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:RMT', backbone), num_classes=num_classes, head=head)),
        Call(view=lambda logits: [logits]), load=dict(weights='model_ema'))


def _parity_op(section: str, case: Options) -> Subject:
    """A layer, beside what it adds to its scores."""
    kwargs = case['kwargs']
    form = case.require('op', 'MaSA_whole', 'MaSA_decomposed').removeprefix('MaSA_')
    return Subject(
        Build('vmamba_mm.models.rmt:PlacedAttention', dict(
            dim=kwargs['embed_dim'], num_heads=kwargs['num_heads'], form=form,
            init_value=kwargs['initial_value'], heads_range=kwargs['heads_range'])),
        Call(run='vmamba_mm.testing:run_masa'), state='state_dict',
        convert=lambda weights: {f'attn.{k.replace("lepe.conv", "lepe")}': v
                                 for k, v in weights.items()})


PARITY = Parity(subject=_parity_subject, ops={'op_masa.pt': _parity_op})

FAMILY = Family(
    name='rmt', model='RMT', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS,
    # The projection of a classifier is the norm of its only output.
    classifier_keys=(('proj', 'norm3.proj'), ('norm', 'norm3.norm')),
    head_keys=(('head', 'head.fc'), ('aux_head', 'head.aux')),
    signature=('stages.0.blocks.0.attn.lepe.weight', *(f'stages.0.blocks.0.{name}' for name in (
        'pos.weight', 'attn.q_proj.bias', 'attn.k_proj.bias', 'attn.v_proj.bias',
        'attn.out_proj.bias', 'norm1.bias', 'norm2.bias', 'mlp.dwconv.weight', 'mlp.fc1.weight')),
        'stages.0.decay', 'patch_embed.conv1.conv.weight'),
    first_convs=('patch_embed.conv1.conv.weight',), infer_arch=_infer_arch, parity=PARITY,
    licence='none stated', url='https://github.com/qhfan/RMT')
