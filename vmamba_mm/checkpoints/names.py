"""Names and shapes of checkpoints: the official ones to ours, back, and what they hold.

Pure functions on state dicts (name -> tensor), for any family. Ours is OpenMMLab's layout:
``backbone.*``, beside it ``head.fc.*`` (classification) or the necks and heads of a detector or
segmentor.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from vmamba_mm.checkpoints.places import (
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
    the state of a metric, which are dropped. Else places stay as they are.

    Args:
        state_dict: the weights.
        keep_places: models that lie inside another, and not at the top, stay as they are: a model
            of ours takes official names there as well, and another one may be the authors' own.
        family: the family that is meant, if the names need not be exactly those of one.

    Raises:
        UserError: if the state dict is of no family, or has a backbone's name that is unknown.
    """
    places = find_models(state_dict, family)
    if not places:
        raise UserError(_describe_unknown(state_dict, family))
    if keep_places and any(place.prefix == 'backbone.' for place in places):
        return dict(state_dict)
    state = unwrap(state_dict)
    places = find_models(state, family)
    if keep_places and all(place.prefix for place in places):
        is_ours = any(p.prefix == 'backbone.' or not p.is_official for p in places)
        return state if is_ours else dict(state_dict)
    state = drop_wrappers(state)
    if not keep_places:
        state = to_top(state, [place.prefix for place in places])
        places = find_models(state, family)
    if any(place.is_official and not place.prefix for place in places):
        state = {k: v for k, v in state.items() if not is_of_trainer(k)}
    for place in places:
        state = _rename_backbone(state, place)
    return state


def to_official(state_dict: StateDict, family: Family | None = None) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_mm`, to the official names (the newest, where there are several).

    A classifier's backbone and head lose their prefixes, as in official classification files;
    a bare backbone loses it too; detectors and segmentors keep ``backbone.``.
    """
    state = to_mm(state_dict, family=family)
    task = infer_task(state)
    family = family or _only_place(state).family
    backbone = inside(state, 'backbone.')
    beside = {k: v for k, v in state.items() if not k.startswith('backbone.')}
    rows = family.rows(backbone)
    if task == 'cls':
        rows = family.classifier_keys + rows
        beside = {_renamed(k, inverse(family.head_keys), family): v for k, v in beside.items()}
    prefix = 'backbone.' if task in ('det', 'seg') else ''
    return {prefix + _renamed(k, inverse(rows), family): v for k, v in backbone.items()} | beside


def is_official(state_dict: Mapping[str, Any], family: Family) -> bool:
    """Whether the names are official ones of the family, alone."""
    return any(p.is_official and not p.prefix for p in find_models(state_dict, family))


def _describe_unknown(state_dict, family=None):
    if not guess_models(state_dict):
        models = [family.model] if family else [f.model for f in FAMILIES.values()]
        shown = ', '.join(map(str, list(state_dict)[:3])) or 'nothing'
        return (f'the weights are not those of a {" or ".join(models)}; they are named '
                f'{shown}, ...')
    place = guess_models(state_dict)[0]
    try:
        weights = inside(to_mm(state_dict, family=place.family), 'backbone.')
    except UserError as err:
        return str(err)
    missing = [name for name in place.family.signature if name not in weights]
    if not missing:
        rows = our_rows(place.family.rows(weights))
        unknown = [k for k in weights if not has_row(k, rows)]
        return _of_none(place.family, unknown[0]) if unknown else \
            f'the weights have the names of a {place.family.model}, and not its shapes'
    return f'the weights are named like those of a {place.family.model}, but lack {missing[0]!r}'


def _of_none(family, key):
    return (f'the weights are named like those of a {family.model}, but {key} is of none that '
            'was published')


def _only_place(state):
    places = find_models(state) or guess_models(state)
    return next((p for p in places if p.prefix == 'backbone.'), places[0])


def _rename_backbone(state, place):
    """Rename the model at a place; at the top all of it is one."""
    family, prefix = place.family, place.prefix
    inner = inside(state, prefix)
    heads = our_rows(family.head_keys)
    if place.is_official:
        inner = rename_official(inner, family, inner)
    else:
        inner = {k: _flatten_linear(k, v, family) for k, v in inner.items()}
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
        UserError: on a name that no official model has.
    """
    rows = family.all_rows(names)
    renamed = {_renamed(k, rows, family): v for k, v in weights.items()}
    return {k: _flatten_linear(k, v, family) for k, v in renamed.items() if k is not None}


def _renamed(key, rows, family):
    try:
        return rename(key, rows)
    except LookupError:
        raise UserError(_of_none(family, key)) from None


def _flatten_linear(key, value, family):
    if family.linear and re.search(family.linear, key) \
            and value.dim() == 4 and value.shape[2:] == (1, 1):
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
        places = find_models(state_dict) or guess_models(state_dict)
        if not places:
            raise UserError(_describe_unknown(state_dict))
        family = places[0].family
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
    """Which models lie where, and what else there is, for messages."""
    places = find_models(state_dict, family) if family else guess_models(state_dict)
    parts = []
    for place in places:
        below = {f'backbone.{k}': v for k, v in inside(state_dict, place.prefix).items()}
        try:
            arch = infer_arch(below, place.family)
        except UserError:
            arch = None
        name = f' ({arch})' if isinstance(arch, str) else ''
        parts.append(f'a {place.family.model}{name} '
                     + (f'under {place.prefix!r}' if place.prefix else 'at the top'))
    prefixes = [place.prefix for place in places]
    beside = sorted({_first_parts(k, prefixes) for k in state_dict
                     if not k.startswith(tuple(prefixes))})
    return ' and '.join(parts) + (f', and beside it {", ".join(beside[:8])}' if beside else '')


def _first_parts(key, prefixes):
    """As much of a name as tells it from the places of models."""
    parts = key.split('.')
    common = max(_common_length(parts, prefix.split('.')) for prefix in prefixes)
    return '.'.join(parts[:common + 1])


def _common_length(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)))
