"""Names and shapes of checkpoints: the official ones to ours, back, and what they hold.

Pure functions on state dicts (name -> tensor), for any family. Ours is OpenMMLab's layout:
``backbone.*``, beside it ``head.fc.*`` (classification) or the necks and heads of a detector or
segmentor.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from vmamba_mm.checkpoints.prefixes import (
    StateDict,
    drop_wrappers,
    find_models,
    guess_models,
    inside,
    to_top,
    unwrap,
)
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES, Family, name_of
from vmamba_mm.families.names import has_row, inverse, is_of_trainer, our_rows, rename


def to_mm(state_dict: StateDict, keep_places: bool = False,
          family: Family | None = None) -> dict[str, torch.Tensor]:
    """The same weights under our names; names that are ours already stay.

    ``module.`` and ``model.`` around everything, the wrappers of torch.compile, FSDP and
    activation checkpointing anywhere, and the counters of thop and of averages are dropped; a bare
    backbone becomes ``backbone.*``, Linear weights become 2-D. Tensors are not copied.

    The only model of a state dict comes to ``backbone.``, whatever the trainer called its place
    (``net.``, ``net.backbone.``), if all else lies there with it, but for the weights of a loss or
    the state of a metric, which are dropped. So does that of an official classifier from its
    family's own place (``Family.place``). Else models stay where they are.

    Args:
        state_dict: the weights.
        keep_places: models that lie inside another, and not at the top, stay as they are: a model
            of ours takes official names there as well, and another one may be the authors' own.
        family: the family that is meant, if the names need not be exactly those of one.

    Raises:
        UserError: if the state dict is of no family, or has a backbone's name that is unknown.
    """
    models = find_models(state_dict, family)
    if not models:
        raise UserError(_describe_unknown(state_dict, family))
    if keep_places and any(model.prefix == 'backbone.' for model in models):
        return dict(state_dict)
    state = unwrap(state_dict)
    models = find_models(state, family)
    if _is_classifier_of(models, state):
        state = {k.removeprefix(models[0].prefix): v for k, v in state.items()}
        models = find_models(state, family)
    if keep_places and all(model.prefix for model in models):
        is_ours = any(m.prefix == 'backbone.' or not m.is_official for m in models)
        return state if is_ours else dict(state_dict)
    state = drop_wrappers(state)
    if not keep_places:
        state = to_top(state, [model.prefix for model in models])
        models = find_models(state, family)
    if any(model.is_official and not model.prefix for model in models):
        state = {k: v for k, v in state.items() if not is_of_trainer(k)}
    for model in models:
        state = _rename_backbone(state, model)
    return state


def to_official(state_dict: StateDict, family: Family | None = None) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_mm`, to the official names (the newest, where there are several).

    The backbone of a classifier, or of what else the family's official files hold, comes to its
    family's own place (``Family.place``), mostly the top, and its head to the top or there too; a
    bare backbone comes to the top; other detectors and segmentors keep ``backbone.``.
    """
    state = to_mm(state_dict, family=family)
    task = infer_task(state)
    family = family or _main_model(state).family
    backbone = inside(state, 'backbone.')
    beside = {k: v for k, v in state.items() if not k.startswith('backbone.')}
    rows = family.rows(backbone)
    prefix = 'backbone.' if task in ('det', 'seg') else ''
    head_rows = family.head_rows(beside)
    if task == family.task and (
            task == 'cls' or all(has_row(k, our_rows(head_rows)) for k in beside)):
        rows, prefix = family.classifier_rows(backbone) + rows, family.place
        beside = {(prefix if family.has_head_inside else '')
                  + _renamed(k, inverse(head_rows), family): _official_shape(k, v, family)
                  for k, v in beside.items()}
    return {prefix + _renamed(k, inverse(rows), family): _official_shape(k, v, family)
            for k, v in backbone.items()} | beside


def is_official(state_dict: Mapping[str, Any], family: Family) -> bool:
    """Whether the names are official ones of the family, alone."""
    return any(m.is_official and not m.prefix for m in find_models(state_dict, family))


def _describe_unknown(state_dict, family=None):
    if not guess_models(state_dict):
        classes = [family.model] if family else [f.model for f in FAMILIES.values()]
        shown = ', '.join(map(str, list(state_dict)[:3])) or 'nothing'
        return (f'the weights are not those of a {" or ".join(classes)}; they are named '
                f'{shown}, ...')
    model = guess_models(state_dict)[0]
    try:
        weights = inside(to_mm(state_dict, family=model.family), 'backbone.')
    except UserError as err:
        return str(err)
    missing = [name for name in model.family.signature if name not in weights]
    if not missing:
        rows = our_rows(model.family.rows(weights))
        unknown = [k for k in weights if not has_row(k, rows)]
        if unknown:
            return _of_none(model.family, unknown[0])
        try:
            model.family.infer_arch({k: v for k, v in weights.items() if hasattr(v, 'shape')})
        except KeyError as err:  # a name that one variant of the family must have
            missing = err.args
        except ValueError:
            pass
        if not missing:
            return f'the weights have the names of a {model.family.model}, and not its shapes'
    return f'the weights are named like those of a {model.family.model}, but lack {missing[0]!r}'


def _of_none(family, key):
    return (f'the weights are named like those of a {family.model}, but {key} is of none that '
            'was published')


def _main_model(state):
    models = find_models(state) or guess_models(state)
    return next((m for m in models if m.prefix == 'backbone.'), models[0])


def _is_classifier_of(models, state):
    """Whether it is an official classifier, whose backbone lies at its family's own place."""
    if len(models) != 1 or not models[0].is_official \
            or models[0].prefix != (models[0].family.place or None):
        return False
    family, prefix = models[0].family, models[0].prefix
    beside = [k for k in state if not k.startswith(prefix)]
    heads = inside(state, prefix) if family.has_head_inside else beside
    rows = family.head_rows(heads)
    if family.has_head_inside:
        return not beside and any(has_row(k, rows) for k in heads)
    return bool(beside) and all(has_row(k, rows) for k in beside)


def _rename_backbone(state, model):
    """Rename the weights of a model; one at the top has all that there is."""
    family, prefix = model.family, model.prefix
    inner = inside(state, prefix)
    heads = our_rows(family.head_rows(inner))
    if model.is_official:
        inner = rename_official(inner, family, inner)
    else:
        inner = {k: our_shape(k, v, family) for k, v in inner.items()}
    if not prefix:
        return {k if has_row(k, heads) else f'backbone.{k}': v for k, v in inner.items()}
    renamed = {prefix + k: v for k, v in inner.items()}
    out = {}
    for key, value in state.items():  # in the order of the file
        if not key.startswith(prefix):
            out[key] = value
        elif renamed:
            out.update(renamed)
            renamed = {}
    return out


def rename_official(weights: StateDict, family: Family, names: Collection[str]
                    ) -> dict[str, torch.Tensor]:
    """Official weights of a backbone by our names, without ``backbone.`` before them.

    Args:
        weights: all that a backbone has, or a part; a head may lie beside.
        names: of all of them, which tell the variant.

    Raises:
        UserError: on a name that no official model has, and on a table that is none of the family's
            (``Family.tables``).
    """
    rows = family.all_rows(names)
    renamed = {}
    for key, value in weights.items():
        name = _renamed(key, rows, family)
        if name is None:
            _check_table(key, value, family)
        else:
            renamed[name] = our_shape(name, value, family)
    return renamed


#: How far a table may be off its formula: averages of weights average tables too.
_ROUNDING = 1e-5


def _check_table(key, value, family):
    formula = next((formula for official, formula in family.tables
                    if has_row(key, ((official, None),))), None)
    if formula is None or value.is_meta:
        return
    try:
        error = (value.float() - formula(value.float())).abs().max().item()
    except ValueError as err:
        raise UserError(f'{key} of shape {tuple(value.shape)} is not the table that a '
                        f'{family.model} computes: {err}') from err
    if not error <= max(_ROUNDING, torch.finfo(value.dtype).eps):
        raise UserError(f'{key} is up to {error:.1e} off the table that a {family.model} computes: '
                        'the weights are of another variant, which is not here')


def _renamed(key, rows, family):
    try:
        return rename(key, rows)
    except LookupError:
        raise UserError(_of_none(family, key)) from None


def our_shape(key: str, value: torch.Tensor, family: Family) -> torch.Tensor:
    """A weight by our name in the shape that our model has it in."""
    if family.linear and re.search(family.linear, key) \
            and value.dim() == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    if family.scalars and re.search(family.scalars, key) and value.dim() == 0:
        return value.reshape(1)
    held, ours = _shapes(key, family)
    return _reshaped(value, held, ours)


def _official_shape(key, value, family):
    if family.scalars and re.search(family.scalars, key) and value.numel() == 1:
        return value.reshape(())
    held, ours = _shapes(key, family)
    return _reshaped(value, ours, held)


def _shapes(key, family):
    """The shapes of a weight of our name in official files and in our model, if they differ."""
    return next(((held, ours) for pattern, held, ours in family.shapes
                 if re.search(pattern, key)), ((), ()))


def _reshaped(value, found, wanted):
    """A weight of one such shape in the other; as it is if it has not that shape."""
    if not found or value.dim() != len(found) or any(
            size not in (None, held) for size, held in zip(found, value.shape, strict=True)):
        return value
    sizes = iter([held for size, held in zip(found, value.shape, strict=True) if size is None])
    return value.reshape([next(sizes) if size is None else size for size in wanted])


# --- what a checkpoint holds ------------------------------------------------------------------

def infer_task(state_dict: StateDict) -> str:
    """'cls', 'det', 'seg' or 'backbone', from the names beside ``backbone.`` (our layout)."""
    tops = {k.partition('.')[0] for k in state_dict}
    if 'decode_head' in tops:
        return 'seg'
    if tops & {'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'neck'}:
        return 'det'
    return 'cls' if 'head' in tops else 'backbone'


def infer_arch(state_dict: StateDict, family: Family | None = None) -> str | dict[str, Any]:
    """The architecture that names and shapes belong to; the weights' values are not used.

    Args:
        state_dict: of an official file or of ours, with a backbone.
        family: as in :func:`to_mm`; if None, the weights may also be all but exactly those of one.

    Returns:
        The name of a published architecture, or a dict for none of them. What leaves no trace in
        names and shapes, as VMamba's scan order, is taken to be as published.

    Raises:
        UserError: if a weight that tells the architecture is missing, or has another shape.
    """
    if family is None:
        models = find_models(state_dict) or guess_models(state_dict)
        if not models:
            raise UserError(_describe_unknown(state_dict))
        family = models[0].family
    weights = inside(to_mm(state_dict, family=family), 'backbone.')
    weights = {k: v for k, v in weights.items() if hasattr(v, 'shape')}  # no extra states
    try:
        arch = family.infer_arch(weights)
    except KeyError as err:
        raise UserError(f'the weights are named like those of a {family.model}, but lack '
                        f'{err}') from err
    except ValueError as err:
        shapes = ', '.join(f'{k} is {tuple(weights[k].shape)}' for k in family.signature
                           if k in weights)
        raise UserError(f'the weights are named like those of a {family.model}, but have not its '
                        f'shapes: {shapes}') from err
    return name_of(family, arch) or arch


def describe_places(state_dict: StateDict, family: Family | None = None) -> str:
    """Say which models lie under which prefixes, and what lies beside them, for messages."""
    models = find_models(state_dict, family) if family else guess_models(state_dict)
    descriptions = []
    for model in models:
        below = {f'backbone.{k}': v for k, v in inside(state_dict, model.prefix).items()}
        try:
            arch = infer_arch(below, model.family)
        except UserError:
            arch = None
        name = f' ({arch})' if isinstance(arch, str) else ''
        descriptions.append(f'a {model.family.model}{name} '
                            + (f'under {model.prefix!r}' if model.prefix else 'at the top'))
    prefixes = [model.prefix for model in models]
    beside = sorted({_distinct_start(k, prefixes) for k in state_dict
                     if not k.startswith(tuple(prefixes))})
    return ' and '.join(descriptions) \
        + (f', and beside it {", ".join(beside[:8])}' if beside else '')


def _distinct_start(key, prefixes):
    """The beginning of a name, as long as it takes to tell it from the prefixes of models."""
    levels = key.split('.')
    common = max(_common_length(levels, prefix.split('.')) for prefix in prefixes)
    return '.'.join(levels[:common + 1])


def _common_length(first, second):
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
                min(len(first), len(second)))
