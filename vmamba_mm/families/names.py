"""The names of weights: where a model lies in a checkpoint, which family it is of, and our names.

Functions on names alone. A *prefix* is what stands before the names of a backbone, such as
``'backbone.'`` or ``''``. Its names are official, or ours.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping

from vmamba_mm.families.base import Family, Rows

#: before all names: put there by DistributedDataParallel, torch.compile and trainers
OUTER_WRAPPERS = ('module.', '_orig_mod.', 'model.', '_forward_module.', '_fsdp_wrapped_module.')
#: anywhere: put there by torch.compile, FSDP, activation checkpointing and Lightning's strategies
_INNER_WRAPPERS = re.compile(r'(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|'
                             r'_checkpoint_wrapped_module|_forward_module)\.')
#: left in the file by thop
THOP_COUNTER = re.compile(r'(?:.*\.)?(?:total_ops|total_params)$')
#: beside the module that torch's AveragedModel averages
AVERAGE_COUNTER = re.compile(r'(?:.*\.)?n_averaged$')
#: a trainer's own, beside its model: weights of a loss, states of a metric, pixel statistics
_OF_TRAINERS = re.compile(
    r'(?:\w+_)?(?:criterions?|loss|loss_fn|losses|metrics?|acc|accuracy|f1|m?iou|auroc)(?:\.|$)'
    r'|(?:loss|criterion)_\w+(?:\.|$)'
    r'|(?:\w+_)?(?:loss|class|pos)_weights?$|(?:\w+_)?(?:mean|std)$')


# --- wrappers and counters --------------------------------------------------------------------

def plain_name(name: str) -> str:
    """A name without the wrappers of torch.compile, FSDP and activation checkpointing."""
    return _INNER_WRAPPERS.sub('', name)


def is_counter(name: str) -> bool:
    """Whether the name is that of a number which a tool left among the weights."""
    return bool(THOP_COUNTER.match(name) or AVERAGE_COUNTER.match(name))


def is_of_trainer(name: str) -> bool:
    """Whether the name is that of a loss or metric beside the model, not of a part of it."""
    return bool(_OF_TRAINERS.match(name))


def outer_wrappers(names: Collection[str]) -> str:
    """All that stands before every name and belongs to no model, such as ``'module.model.'``."""
    wrappers = ''
    while names:
        wrapper = next((w for w in OUTER_WRAPPERS
                        if all(name.startswith(wrappers + w) for name in names)), None)
        if wrapper is None:
            break
        wrappers += wrapper
    return wrappers


# --- rows -------------------------------------------------------------------------------------

def rename(name: str, rows: Rows) -> str | None:
    """The name by the first row that has it; None if that row leaves it out.

    Raises:
        LookupError: if no row has it.
    """
    for pattern, new in _compiled(rows):
        if match := pattern.match(name):
            if new is None:
                return None
            first, *rest = new.split('#')
            numbers = (a + b for a, b in zip(match.groups(), rest, strict=True))
            return first + ''.join(numbers) + name[match.end():]
    raise LookupError(name)


def has_row(name: str, rows: Rows) -> bool:
    return any(pattern.match(name) for pattern, _ in _compiled(rows))


def inverse(rows: Rows) -> Rows:
    """Rows from our names to the official ones, of which each of ours gets the first."""
    back: dict[str, str] = {}
    for official, ours in rows:
        if ours is not None:
            back.setdefault(ours, official)
    return tuple(back.items())


def our_rows(rows: Rows) -> Rows:
    """Rows that have our names and leave them as they are."""
    return tuple((ours, ours) for _, ours in rows if ours is not None)


@functools.cache
def _compiled(rows):
    return [(re.compile(_pattern(old) + r'(?=\.|$)'), new) for old, new in rows]


def _pattern(name):
    return r'(\d+)'.join(map(re.escape, name.split('#')))


# --- prefixes ---------------------------------------------------------------------------------

def find_prefixes(family: Family, names: Iterable[str]) -> dict[str, bool]:
    """{prefix: whether the names there are official} of all that may be models of the family.

    A prefix counts if the first name of the signature lies below it, with any numbers in it.
    Whoever knows that a model of the family is meant can tell from this where it is, and name
    what is wrong with it; whether it is one, :func:`exact_prefixes` says.
    """
    official, ours = _anchors(family)
    names = list(names)
    prefixes: dict[str, bool] = {}
    for name in names:
        if match := official.match(name):
            if not ours.match(name):
                prefixes[match[1]] = True
            elif match[1] not in prefixes:  # both call it so: the others tell
                prefixes[match[1]] = _are_rather_official(family, names, match[1])
        elif match := ours.match(name):
            prefixes.setdefault(match[1], False)
    return dict(sorted(prefixes.items()))


def _are_rather_official(family, names, prefix):
    below = [name[len(prefix):] for name in names if name.startswith(prefix)]
    rows = family.all_rows(below)
    return sum(has_row(k, rows) for k in below) > sum(has_row(k, our_rows(rows)) for k in below)


@functools.cache
def _anchor_patterns(rows, anchor):
    prefix = r'((?:.*?\.)??)'
    ends = [official + anchor[len(_without_numbers(ours)):] for official, ours in rows
            if ours is not None and f'{anchor}.'.startswith(f'{_without_numbers(ours)}.')]
    any_end = '|'.join(_pattern(end).replace('(', '(?:') for end in ends) or '(?!)'
    return (re.compile(f'{prefix}(?:{any_end})$'),
            re.compile(f'{prefix}{_pattern(anchor).replace("(", "(?:")}$'))


def _anchors(family):
    return _anchor_patterns(family.rows(()), _without_numbers(family.signature[0]))


def _without_numbers(name):
    return re.sub(r'(?<![^.])\d+(?![^.])', '#', name)


def exact_prefixes(family: Family, weights: Mapping[str, object]) -> dict[str, bool]:
    """The part of :func:`find_prefixes` below which the weights are exactly those of the family.

    All names of the signature must be there, every name below the prefix must have a row, and the
    shapes must tell an architecture. At the top, ``''``, a trainer's weights of losses may lie
    beside.

    Args:
        weights: by plain names (:func:`plain_name`) without counters.
    """
    return {prefix: is_official for prefix, is_official in find_prefixes(family, weights).items()
            if _is_exact(family, weights, prefix, is_official)}


def _is_exact(family, weights, prefix, is_official):
    below = {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}
    if not prefix:
        below = {k: v for k, v in below.items() if not is_of_trainer(k)}
    rows = family.all_rows(below)
    if not is_official:
        # A head beside a bare backbone is at the top; below a prefix there is the backbone alone.
        rows = our_rows(family.rows(below) if prefix else rows)
    try:
        ours = {rename(k, rows): v for k, v in below.items()}
    except LookupError:
        return False
    if not set(family.signature) <= set(ours):
        return False
    try:  # without what our model leaves out, and without the extra states of modules
        family.infer_arch({k: v for k, v in ours.items() if k is not None and hasattr(v, 'shape')})
    except (KeyError, ValueError):
        return False
    return True
