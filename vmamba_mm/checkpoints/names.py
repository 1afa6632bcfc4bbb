"""Names and shapes of VMamba checkpoints: the official ones to ours, back, and what they hold.

Pure functions on state dicts (name -> tensor). Ours is OpenMMLab's layout: ``backbone.*``, beside
it ``head.fc.*`` (classification) or the necks and heads of a detector or segmentor.

Official files have two generations of names. The older one (January 2024) is renamed to the newer
first; its Linear weights may be (out, in, 1, 1) in both.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vmamba_mm.errors import UserError
from vmamba_mm.families.vmamba import ARCH_SETTINGS
from vmamba_mm.zoo import config_for

StateDict = Mapping[str, torch.Tensor]

#: first generation -> second; '#' stands for a number, a name for all that begins with it
_OLDER_NAMES = (
    ('patch_embed.proj', 'patch_embed.0'),
    ('patch_embed.norm', 'patch_embed.2'),
    ('layers.#.blocks.#.ln_1', 'layers.#.blocks.#.norm'),
    ('layers.#.blocks.#.self_attention', 'layers.#.blocks.#.op'),
    ('norm', 'classifier.norm'),
    ('head', 'classifier.head'),
)
#: second generation <-> ours
_NAMES = (
    ('layers.#.blocks.#.norm', 'stages.#.blocks.#.norm1'),
    ('layers.#.blocks.#.op', 'stages.#.blocks.#.ssm'),
    ('layers.#.blocks.#.norm2', 'stages.#.blocks.#.norm2'),
    ('layers.#.blocks.#.mlp', 'stages.#.blocks.#.mlp'),
    ('outnorm#', 'norm#'),
)
_STEM_NAMES = {
    'patch': (('patch_embed.0', 'patch_embed.proj'), ('patch_embed.2', 'patch_embed.norm')),
    'conv': (('patch_embed.0', 'patch_embed.conv1'), ('patch_embed.2', 'patch_embed.norm1'),
             ('patch_embed.5', 'patch_embed.conv2'), ('patch_embed.7', 'patch_embed.norm2')),
}
_DOWNSAMPLE_NAMES = {
    'merge': (('layers.#.downsample.norm', 'stages.#.downsample.norm'),
              ('layers.#.downsample.reduction', 'stages.#.downsample.reduction')),
    'conv': (('layers.#.downsample.1', 'stages.#.downsample.conv'),
             ('layers.#.downsample.3', 'stages.#.downsample.norm')),
}
_CLASSIFIER_NORM = (('classifier.norm', 'norm3'),)
_CLASSIFIER_HEAD = (('classifier.head', 'head.fc'),)

_LINEAR = re.compile(r'\.(in_proj|out_proj|fc1|fc2|reduction|head|fc)\.weight$')
#: around everything
_WRAPPERS = ('module.', '_orig_mod.', 'model.', '_forward_module.', '_fsdp_wrapped_module.')
#: anywhere: put there by torch.compile, FSDP, activation checkpointing and Lightning's strategies
_INNER_WRAPPERS = re.compile(r'(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|'
                             r'_checkpoint_wrapped_module|_forward_module)\.')
#: left in the file by thop
_COUNTERS = ('total_ops', 'total_params')
#: beside the module that torch's AveragedModel averages
_AVERAGE_COUNTER = re.compile(r'(?:.*\.)?n_averaged$')
#: of a trainer's own, beside its model: weights of a loss, states of a metric, pixel statistics
_NOT_OF_THE_MODEL = re.compile(
    r'(?:\w+_)?(?:criterions?|loss|loss_fn|losses|metrics?|acc|accuracy|f1|m?iou|auroc)(?:\.|$)'
    r'|(?:loss|criterion)_\w+(?:\.|$)'
    r'|(?:\w+_)?(?:loss|class|pos)_weights?$|(?:\w+_)?(?:mean|std)$')
#: what tells a VMamba, official or ours; before it stands its place
_A_LOGS = re.compile(
    r'((?:.*?\.)??)(layers|stages)\.\d+\.blocks\.\d+\.(?:op|self_attention|ssm)\.A_logs$')
#: the first convolution of either stem
FIRST_CONVS = ('patch_embed.conv1.weight', 'patch_embed.proj.weight')

_TASKS = {'cls': 'a classifier', 'det': 'a detector', 'seg': 'a segmentor',
          'backbone': 'a backbone alone'}


# --- names ----------------------------------------------------------------------------------

def is_vmamba(state_dict: Mapping[str, Any]) -> bool:
    """Whether the names are those of a VMamba, official or ours, alone or inside a model."""
    return any(_is_text(k) and k.endswith('.A_logs') and 'blocks.' in k for k in state_dict)


def to_mm(state_dict: StateDict, keep_places: bool = False) -> dict[str, torch.Tensor]:
    """The same weights under our names; names that are ours already stay.

    ``module.`` and ``model.`` around everything, the wrappers of torch.compile, FSDP and
    activation checkpointing anywhere, and the counters of thop and of averages are dropped; a bare
    backbone becomes ``backbone.*``, Linear weights become 2-D. Tensors are not copied.

    The only VMamba of a state dict comes to ``backbone.``, whatever the trainer called its place
    (``net.``, ``net.backbone.``), if all else lies there with it, but for the weights of a loss or
    the state of a metric, which are dropped. Else places stay as they are.

    Args:
        state_dict: the weights.
        keep_places: VMambas that have our names keep their places and the wrappers in them.

    Raises:
        UserError: if the state dict is of no VMamba, or has a backbone's name that is unknown.
    """
    if not is_vmamba(state_dict):
        shown = ', '.join(map(str, list(state_dict)[:3])) or 'nothing'
        raise UserError(f'the weights are not those of a VMamba; they are named {shown}, ...')
    if keep_places and any(k.startswith('backbone.stages.') for k in state_dict):
        return dict(state_dict)
    state = _unwrap(state_dict)
    found = [m for k in state if (m := _A_LOGS.match(plain_name(k)))]
    if not found or keep_places and all(m[1] and m[2] == 'stages' for m in found):
        return state
    state = drop_wrappers(state)
    if not keep_places:
        state = _to_top(state)
    if is_official(state):
        state = {k: v for k, v in state.items() if not _NOT_OF_THE_MODEL.match(k)}
    for prefix in backbone_prefixes(state):
        state = _rename_backbone(state, prefix)
    return state


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether the names are those of an official VMamba alone, of either generation."""
    return any((m := _A_LOGS.match(plain_name(k))) and m[1] == '' and m[2] == 'layers'
               for k in state_dict)


def plain_name(name: str) -> str:
    """A name without the wrappers of torch.compile, FSDP and activation checkpointing."""
    return _INNER_WRAPPERS.sub('', name)


def backbone_prefixes(state_dict: Mapping[str, Any]) -> list[str]:
    """What stands before each VMamba's names: '' or 'backbone.' or, in a distiller, several."""
    return sorted({m[1] for k in state_dict if (m := _A_LOGS.match(plain_name(k)))})


def to_official(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_mm`, to the second generation of official names.

    A classifier's backbone and head lose their prefixes, as in the official classification files;
    a bare backbone loses it too; detectors and segmentors keep ``backbone.``.
    """
    state = to_mm(state_dict)
    backbone = _inside(state, 'backbone.')
    others = {k: v for k, v in state.items() if not k.startswith('backbone.')}
    task = infer_task(state)
    table = _NAMES + _kind_names(backbone)
    if task == 'cls':
        table = _CLASSIFIER_NORM + table
        others = {_rename(k, _inverse(_CLASSIFIER_HEAD)): v for k, v in others.items()}
    prefix = 'backbone.' if task in ('det', 'seg') else ''
    renamed = {prefix + _rename(k, _inverse(table)): v for k, v in backbone.items()}
    return renamed | others


def _is_text(key):
    return isinstance(key, str)


def _inside(state, prefix):
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}


def _unwrap(state_dict):
    state = {k: v for k, v in state_dict.items()
             if k.rpartition('.')[2] not in _COUNTERS and k != 'n_averaged'}
    while True:
        prefix = next((w for w in _WRAPPERS if all(k.startswith(w) for k in state)), None)
        if prefix is None:
            return state
        state = _inside(state, prefix)


def drop_wrappers(state: StateDict) -> dict[str, torch.Tensor]:
    """The same weights by their :func:`plain_name`, which must be of one each."""
    plain = {}
    for key, value in state.items():
        if (name := plain_name(key)) in plain:
            raise UserError(f'{name} is there twice, once as {key}: save one of the two, the '
                            'compiled (or wrapped) model or the one in it')
        plain[name] = value
    return plain


def _to_top(state):
    """Bring the only VMamba, with all that lies beside it, to where our models have it."""
    places = backbone_prefixes(state)
    if len(places) != 1 or places[0] in ('', 'backbone.'):
        return state
    parts = places[0].split('.')[:-1]
    moved = {k: v for k, v in state.items() if not _AVERAGE_COUNTER.match(k)
             and (k.startswith(f'{parts[0]}.') or not _NOT_OF_THE_MODEL.match(k))}
    for depth in reversed([i for i, part in enumerate(parts) if part == 'module']):
        # Data-parallel wrappers inside; they are around the neighbours too.
        moved = {_without_part(k, depth, 'module'): v for k, v in moved.items()}
        del parts[depth]
    root = ''.join(f'{part}.' for part in (parts[:-1] if parts[-1:] == ['backbone'] else parts))
    return _inside(moved, root) if all(k.startswith(root) for k in moved) else state


def _without_part(key, depth, part):
    parts = key.split('.')
    if parts[depth:depth + 1] == [part]:
        del parts[depth]
    return '.'.join(parts)


def _rename_backbone(state, prefix):
    """Rename the VMamba below ``prefix``; without a prefix all of it is one."""
    inner = _inside(state, prefix)
    if is_official(inner):
        inner = _rename_official(inner)
    inner = {k: _flatten_linear(k, v) for k, v in inner.items()}
    if not prefix:
        return {k if k.startswith('head.fc.') else f'backbone.{k}': v for k, v in inner.items()}
    renamed = iter(inner.items())
    out = {}
    for key, value in state.items():  # in the order of the file
        if key.startswith(prefix):
            key, value = next(renamed)
            key = prefix + key
        out[key] = value
    return out


def _rename_official(state):
    state = {_rename(k, _OLDER_NAMES, default=k): v for k, v in state.items()}
    stem = 'conv' if 'patch_embed.5.weight' in state else 'patch'
    merge = any('.downsample.reduction.' in k for k in state)
    table = (_CLASSIFIER_NORM + _CLASSIFIER_HEAD + _NAMES + _STEM_NAMES[stem]
             + _DOWNSAMPLE_NAMES['merge' if merge else 'conv'])
    return {_rename(k, table): v for k, v in state.items()}


def _kind_names(backbone):
    stem = 'conv' if 'patch_embed.conv1.weight' in backbone else 'patch'
    merge = any('.downsample.reduction.' in k for k in backbone)
    return _STEM_NAMES[stem] + _DOWNSAMPLE_NAMES['merge' if merge else 'conv']


def _inverse(table):
    return tuple((ours, official) for official, ours in table)


def _rename(key, table, default=None):
    for old, new in table:
        match = re.match(old.replace('.', r'\.').replace('#', r'(\d+)') + r'\.', key)
        if match:
            numbers = iter(match.groups())
            head = re.sub('#', lambda _: next(numbers), new)  # noqa: B023 (used at once)
            return f'{head}.{key[match.end():]}'
    if default is None:
        raise UserError(f'the weights are named like those of a VMamba, but {key} is of none that '
                        'was published')
    return default


def _flatten_linear(key, value):
    if _LINEAR.search(key) and value.dim() == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    return value


# --- what a checkpoint holds ------------------------------------------------------------------

def infer_task(state_dict: StateDict) -> str:
    """'cls', 'det', 'seg' or 'backbone', from the names beside ``backbone.`` (our layout)."""
    tops = {k.partition('.')[0] for k in state_dict}
    if 'decode_head' in tops:
        return 'seg'
    if tops & {'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'neck'}:
        return 'det'
    return 'cls' if 'head' in tops else 'backbone'


def infer_arch(state_dict: StateDict) -> str | dict[str, Any]:
    """The architecture that names and shapes belong to; the weights' values are not used.

    Args:
        state_dict: of an official file or of ours, with a backbone.

    Returns:
        A name of ``VMamba.arch_settings``, or a dict for none of them. The scan order, the
        activation and the initialisation leave no trace in names and shapes: they are taken to
        be the published ones.

    Raises:
        UserError: if the first block lacks a weight that tells the architecture, or has others'
            shapes.
    """
    weights = _inside(to_mm(state_dict), 'backbone.')
    depths = [len({m[1] for k in weights if (m := re.match(rf'stages\.{i}\.blocks\.(\d+)\.', k))})
              for i in range(4)]
    try:
        block = {k: weights[f'stages.0.blocks.0.{k}'].shape for k in (
            'norm1.weight', 'ssm.in_proj.weight', 'ssm.A_logs', 'ssm.dt_projs_weight')}
    except KeyError as err:
        raise UserError(f'the weights are named like those of a VMamba, but lack {err}') from err
    try:
        dims, = block['norm1.weight']
        _, inner, rank = block['ssm.dt_projs_weight']
        _, d_state = block['ssm.A_logs']
    except ValueError as err:
        raise UserError('the weights are named like those of a VMamba, but have not its shapes: '
                        + ', '.join(f'{k} is {tuple(v)}' for k, v in block.items())) from err
    conv = weights.get('stages.0.blocks.0.ssm.conv2d.weight')
    kernel = 0 if conv is None else conv.shape[-1]
    mlp = weights.get('stages.0.blocks.0.mlp.fc1.weight')
    arch = dict(
        embed_dims=dims, depths=tuple(depths), d_state=d_state,
        ssm_ratio=inner / dims, dt_rank='auto' if rank == math.ceil(dims / 16) else rank,
        conv_bias='stages.0.blocks.0.ssm.conv2d.bias' in weights,
        gate=block['ssm.in_proj.weight'][0] == 2 * inner,
        mlp_ratio=0.0 if mlp is None else mlp.shape[0] / dims,
        stem='conv' if 'patch_embed.conv1.weight' in weights else 'patch',
        downsample='merge' if 'stages.0.downsample.reduction.weight' in weights else 'conv',
        scan='cross')
    if kernel != 3:
        arch['conv_kernel'] = kernel
    return name_of(arch) or arch


def name_of(arch: Mapping[str, Any]) -> str | None:
    """The published name of a resolved architecture, if it has one."""
    return next((name for name, settings in ARCH_SETTINGS.items() if settings == arch), None)


# --- comparing ----------------------------------------------------------------------------------

def differences(expected: StateDict, found: StateDict) -> dict[str, str]:
    """{name: what is wrong} of the weights found for a model whose own are expected."""
    wrong = {}
    for key in [*expected, *(k for k in found if k not in expected)]:
        if key not in found:
            wrong[key] = f'is missing (the model has {_shape(expected[key])})'
        elif key not in expected:
            wrong[key] = f'is not in the model (the file has {_shape(found[key])})'
        elif _shape(expected[key]) != _shape(found[key]):
            wrong[key] = f'is {_shape(found[key])}, in the model {_shape(expected[key])}'
    return wrong


def fit_names(state_dict: StateDict, expected: StateDict) -> dict[str, torch.Tensor]:
    """The same weights by the names of a model that may have its VMamba in another place.

    Wrappers of torch.compile, FSDP and activation checkpointing may be in the model, in the file
    or in both. What belongs to a trainer's loss or metric, and to nothing in the model, is left
    out.

    Args:
        state_dict: as :func:`vmamba_mm.checkpoints.files.read_checkpoint` gives it.
        expected: the model's own.
    """
    state = dict(state_dict)
    if not (is_vmamba(state) and is_vmamba(expected)):
        return state
    if not set(expected) <= set(state):
        own = {plain_name(k): k for k in expected}
        places = backbone_prefixes(own)
        if not set(places) <= set(backbone_prefixes(state)):
            state = to_mm(state)
            found = backbone_prefixes(state)
            if len(places) == len(found) == 1:
                state = _move(state, found[0], places[0])
        state = {own.get(plain_name(k), k): v for k, v in state.items()}
    return {k: v for k, v in state.items() if k in expected or not _NOT_OF_THE_MODEL.match(k)}


def _move(state, old, new):
    if old.endswith('backbone.') and new.endswith('.backbone.'):
        # Its neighbours are beside it in the model too.
        old, new = old.removesuffix('backbone.'), new.removesuffix('backbone.')
    return {new + k[len(old):] if k.startswith(old) else k: v for k, v in state.items()}


def check_patterns(patterns: str | Sequence[str], name: str) -> list[str]:
    """Patterns as a list of regular expressions; one alone may be a str.

    Raises:
        UserError: on anything else; ``name`` says in the message whose patterns they are.
    """
    if not isinstance(patterns, list | tuple):
        patterns = [patterns]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as err:
            raise UserError(f'{name}: {pattern!r} is no regular expression of parameter names, '
                            f"such as '^head': {err}") from err
    return list(patterns)


def find_excused(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns is found in, sorted.

    Args:
        names: with ``backbone.`` before those of a backbone.
        patterns: of :func:`check_patterns`; those of a backbone's names may leave ``backbone.``
            out.
    """
    return sorted(k for k in names if any(re.search(p, k) or re.search(
        p, k.removeprefix('backbone.')) for p in patterns))


def adapt_in_channels(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """A first convolution's weight for another number of input channels, as timm adapts it.

    For one channel the sum over the channels; for others they are repeated in turn, the last round
    cut off, and scaled by I / in_channels, so that the results keep their size.

    Args:
        weight: (C, I, k, k).
        in_channels: wanted in place of I.

    Raises:
        UserError: if I is neither 1 nor 3 and more than one channel is wanted: nobody can say
            which channel is which.
    """
    held = weight.shape[1]
    if held == in_channels:
        return weight
    values = weight.float()  # halves would be summed in their own precision
    if in_channels == 1:
        values = values.sum(dim=1, keepdim=True)
    elif held in (1, 3):
        values = values.repeat(1, math.ceil(in_channels / held), 1, 1)[:, :in_channels]
        values = values * (held / in_channels)
    else:
        raise UserError(f'a stem of {held} channels cannot be adapted to {in_channels}: only '
                        'weights for 1 or 3 channels can, or any to 1')
    return values.to(weight.dtype)


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def explain_differences(wrong: Mapping[str, str], expected: StateDict, found: StateDict,
                        name: str) -> str:
    """One line: which file, what it really holds, what to use instead, the first differences.

    Args:
        wrong: of :func:`differences`, not empty.
        expected, found: of the whole model, or of a backbone with ``backbone.`` before its names.
        name: of the file, for the message.
    """
    shown = [f'{key} {text}' for key, text in list(wrong.items())[:3]]
    if len(wrong) > 3:
        shown.append(f'{len(wrong) - 3} more')
    shown += ["give adapt_in_channels=True to the backbone's load_pretrained, or to its "
              "init_cfg=dict(type='Pretrained', ...), to adapt the stem from "
              f'{found[key].shape[1]} to {expected[key].shape[1]} channels'
              for key in (f'backbone.{k.removeprefix("backbone.")}' for k in wrong)
              if _differs_in_channels(key, expected, found)]
    return f'{name} does not fit the model: {_mix_up(expected, found)}{"; ".join(shown)}'


def _differs_in_channels(key, expected, found):
    """Whether the weight is a stem's first, for another number of channels and else equal."""
    if not key.endswith(FIRST_CONVS) or key not in expected or key not in found:
        return False
    ours, theirs = _shape(expected[key]), _shape(found[key])
    return len(ours) == len(theirs) == 4 and ours[1] != theirs[1] \
        and ours[:1] + ours[2:] == theirs[:1] + theirs[2:]


def describe_places(state_dict: StateDict) -> str:
    """Which VMambas lie where, and what else there is, for messages."""
    places = backbone_prefixes(state_dict)
    parts = []
    for place in places:
        try:
            arch = infer_arch({f'backbone.{k}': v for k, v in _inside(state_dict, place).items()})
        except UserError:
            arch = None
        name = f' ({arch})' if isinstance(arch, str) else ''
        parts.append(f'a VMamba{name} ' + (f'under {place!r}' if place else 'at the top'))
    beside = sorted({_first_parts(k, places) for k in state_dict
                     if not k.startswith(tuple(places))})
    return ' and '.join(parts) + (f', and beside it {", ".join(beside[:8])}' if beside else '')


def _first_parts(key, places):
    """As much of a name as tells it from the places of VMambas."""
    parts = key.split('.')
    common = max(len(os.path.commonprefix([parts, place.split('.')])) for place in places)
    return '.'.join(parts[:common + 1])


def _mix_up(expected, found):
    if not is_vmamba(expected):
        return ''
    if not is_vmamba(found):
        return 'it holds no VMamba backbone; '
    theirs, ours = backbone_prefixes(found), backbone_prefixes(expected)
    if theirs and ours and not set(ours) & set(theirs):
        return f'it holds {describe_places(found)}, the model has its own under {ours[0]!r}; '
    try:
        wanted, held = infer_arch(expected), infer_arch(found)
    except UserError:
        return ''
    task, its_task = infer_task(to_mm(expected)), infer_task(to_mm(found))
    if wanted == held:
        if task == its_task or 'backbone' in (task, its_task):
            return ''
        return f'it holds {_TASKS[its_task]}, and the model is {_TASKS[task]}; '
    if isinstance(held, dict):
        return f'it holds the arch {held}, and the model has another; '
    model = f"is {wanted!r}" if isinstance(wanted, str) else 'has another'
    config = config_for('vmamba', held, task)
    how = f'use {config}' if config else f'build it with arch={held!r}'
    return f'it holds the arch {held!r}, and the model {model}: {how}; '
