"""Whether weights are a VMamba's: what is published must be complete, a user's own need not be."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vmamba_mm.checkpoints.names import (
    check_patterns,
    differences,
    explain_differences,
    find_excused,
    infer_arch,
    is_official,
    plain_name,
    to_mm,
)
from vmamba_mm.errors import UserError


class Caller(NamedTuple):
    """The ``load_state_dict`` at work."""

    strict: bool
    is_mmengine: bool
    state_dict: Any


def find_caller() -> Caller:
    """Which ``load_state_dict`` called a module's ``_load_from_state_dict``, and how.

    Neither torch nor mmengine passes ``strict`` on to the modules (both pass True), and mmengine's
    own function, with strict=False, loads what nobody has looked at: only the frame tells a
    deliberate part from a wrong file. Without one the answer is strict.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == 'load_state_dict' and 'strict' in frame.f_locals:
            package = frame.f_globals.get('__name__', '').partition('.')[0]
            return Caller(bool(frame.f_locals['strict']), package == 'mmengine',
                          frame.f_locals.get('state_dict'))
        frame = frame.f_back
    return Caller(True, False, None)


def under_names_of(found: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by a model's own names: official ones renamed, other wrappers replaced."""
    if is_official(found):
        own = {k: v for k, v in found.items() if k in ours}
        others = to_mm({k: v for k, v in found.items() if k not in ours})
        found = own | {k.removeprefix('backbone.'): v for k, v in others.items()}
    if set(found) <= set(ours):
        return dict(found)
    plain = {plain_name(k): k for k in ours}
    return {k if k in ours else plain.get(plain_name(k), k): v for k, v in found.items()}


def check_fits(model: nn.Module, found: Mapping[str, Tensor], name: str,
               strict: bool | None = None, allow: str | Sequence[str] = (),
               is_whole: bool = False) -> list[str]:
    """Raise one line if weights are not a VMamba's.

    Args:
        model: the VMamba, or of a subclass.
        found: by the model's names.
        name: of the file, for the message.
        strict, allow: as in ``VMamba.load_pretrained``.
        is_whole: the weights should be all of a model, so that strict=False excuses what a user
            added, and no weight of ours that the model lacks.

    Returns:
        The names that were found, or are the model's, and cannot be loaded, all of them excused.
    """
    patterns = check_patterns(allow or (), 'allow')
    expected = model.state_dict()
    wrong = differences(expected, found)
    if not wrong:
        return []
    plain = model.plain_state()
    if is_whole and found and set(found) <= set(expected) - set(plain):
        return []  # adapters alone
    tolerated = {k for k in wrong
                 if (k not in found and k not in plain and strict is not True)
                 or (k not in expected and strict is False and not (is_whole and k in plain))}
    excused = {k.removeprefix('backbone.') for k in
               find_excused([f'backbone.{k}' for k in wrong], patterns)}
    rest = {k: v for k, v in wrong.items() if k not in tolerated | excused}
    hint = ''
    if not rest and any(k in found or k in excused for k in wrong) \
            and _is_of_another_arch(found, plain, model.plain_state):
        rest, hint = wrong, '; neither strict nor allow excuses another architecture'
    if rest:
        expected, found = ({f'backbone.{k}': v for k, v in state.items()}
                           for state in (expected, found))
        raise UserError(explain_differences(rest, expected, found, name) + hint)
    return sorted(wrong)


def _is_of_another_arch(found, plain, plain_state):
    """Whether weights, complete or in part, are another VMamba's than those of ``plain``."""
    wanted = infer_arch(plain)
    try:
        if infer_arch({**plain, **found}) != wanted:  # what is absent says nothing
            return True
        held = infer_arch(found)
        others = plain_state(held)
    except (UserError, ValueError):
        return False  # a part
    return held != wanted and all(k in found for k in others if not k.startswith('norm'))
