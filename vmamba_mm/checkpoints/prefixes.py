"""Under which prefixes models of our families lie in a state dict, and moving them to others."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES, families_at
from vmamba_mm.families.base import Family
from vmamba_mm.families.names import (
    AVERAGE_COUNTER,
    THOP_COUNTER,
    find_prefixes,
    has_row,
    is_counter,
    is_of_trainer,
    our_rows,
    outer_wrappers,
    plain_name,
    rename,
)

StateDict = Mapping[str, torch.Tensor]


class HeldModel(NamedTuple):
    """A model that a state dict holds."""

    prefix: str  #: what stands before the names of its backbone, such as 'backbone.' or ''
    family: Family
    is_official: bool  #: whether the names are the official ones


def find_models(state_dict: Mapping[str, Any], family: Family | None = None) -> list[HeldModel]:
    """The models in a state dict, in the order of their prefixes.

    Args:
        state_dict: whatever wrappers are in its names; they are in no prefix but as ``module.``.
        family: where a model of this family is meant, all that may be one counts. Without it only
            weights count that are exactly those of a family (see
            :func:`vmamba_mm.families.family_of`), and those that have our names, below a prefix,
            with all that such a model needs, among which a user has put modules of their own.

    Raises:
        UserError: if two families say that weights are theirs.
    """
    weights = {plain_name(k): v for k, v in state_dict.items()
               if isinstance(k, str) and not is_counter(k)}
    if family is not None:
        return [HeldModel(prefix, family, is_official)
                for prefix, is_official in find_prefixes(family, weights).items()]
    wrappers = outer_wrappers(weights)
    inner = {k[len(wrappers):]: v for k, v in weights.items()}
    families = {**_extended_models(inner), **families_at(inner)}
    return [HeldModel(wrappers + prefix, f, find_prefixes(f, inner)[prefix])
            for prefix, f in sorted(families.items())]


def guess_models(state_dict: Mapping[str, Any]) -> list[HeldModel]:
    """The models that names alone suggest, each of the family with most of them, for messages."""
    models: dict[str, HeldModel] = {}
    weights = {plain_name(k): v for k, v in state_dict.items() if isinstance(k, str)}
    for family in FAMILIES.values():
        for prefix, is_official in find_prefixes(family, weights).items():
            model = HeldModel(prefix, family, is_official)
            models[prefix] = max((m for m in (models.get(prefix), model) if m),
                                 key=lambda m: _likeness(m, weights))
    return [models[prefix] for prefix in sorted(models)]


def _likeness(model, weights):
    """How many names are the family's, what part of its signature is there, and whether the shapes
    are its own: there are families of the same names."""
    family = model.family
    below = {k.removeprefix(model.prefix): v for k, v in weights.items()
             if k.startswith(model.prefix)}
    rows = family.rows(below)
    if model.is_official:
        ours = {rename(k, rows): v for k, v in below.items() if has_row(k, rows)}
    else:
        rows, ours = our_rows(rows), below
    known = sum(has_row(k, rows) for k in below)
    try:
        family.infer_arch({k: v for k, v in ours.items() if k is not None and hasattr(v, 'shape')})
        fits = True
    except (KeyError, ValueError):
        fits = False
    return known, sum(name in ours for name in family.signature) / len(family.signature), fits


def _extended_models(weights):
    """{prefix: family} of models by our names that a user has put modules of their own into."""
    families = {}
    for family in FAMILIES.values():
        for prefix, is_official in find_prefixes(family, weights).items():
            if prefix and not is_official \
                    and all(prefix + name in weights for name in family.signature):
                families[prefix] = None if prefix in families else family  # of two: who can tell?
    return {prefix: family for prefix, family in families.items() if family is not None}


# --- moving -----------------------------------------------------------------------------------

def inside(state: StateDict, prefix: str) -> dict[str, torch.Tensor]:
    """The weights below a prefix, by their names without it."""
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}


def unwrap(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """The weights without what stands before all names, and without the counters of tools."""
    state = {k: v for k, v in state_dict.items()
             if not THOP_COUNTER.match(k) and k != 'n_averaged'}
    return inside(state, outer_wrappers(state))


def drop_wrappers(state: StateDict) -> dict[str, torch.Tensor]:
    """The same weights by their plain names, which must be of one each."""
    plain = {}
    for key, value in state.items():
        if (name := plain_name(key)) in plain:
            raise UserError(f'{name} is there twice, once as {key}: save one of the two, the '
                            'compiled (or wrapped) model or the one in it')
        plain[name] = value
    return plain


def to_top(state: StateDict, prefixes: Iterable[str]) -> StateDict:
    """Bring the only model, with all that lies beside it, to where our models have it."""
    prefixes = list(prefixes)
    if len(prefixes) != 1 or prefixes[0] in ('', 'backbone.'):
        return state
    levels = prefixes[0].split('.')[:-1]
    moved = {k: v for k, v in state.items() if not AVERAGE_COUNTER.match(k)
             and (k.startswith(f'{levels[0]}.') or not is_of_trainer(k))}
    for depth in reversed([i for i, level in enumerate(levels) if level == 'module']):
        # Data-parallel wrappers inside; they are around the neighbours too.
        moved = {_without_level(k, depth, 'module'): v for k, v in moved.items()}
        del levels[depth]
    if levels[-1:] == ['backbone']:
        del levels[-1]
    root = ''.join(f'{level}.' for level in levels)
    return inside(moved, root) if all(k.startswith(root) for k in moved) else state


def move(state: StateDict, old: str, new: str) -> dict[str, torch.Tensor]:
    """The weights with a model under another prefix, and its neighbours beside it if they were."""
    if old.endswith('backbone.') and new.endswith('.backbone.'):
        old, new = old.removesuffix('backbone.'), new.removesuffix('backbone.')
    return {new + k[len(old):] if k.startswith(old) else k: v for k, v in state.items()}


def _without_level(key, depth, level):
    levels = key.split('.')
    if levels[depth:depth + 1] == [level]:
        del levels[depth]
    return '.'.join(levels)
