"""Whether weights are a model's: what differs, and one line that says so."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from vmamba_mm.checkpoints.names import describe_places, infer_arch, infer_task, to_mm
from vmamba_mm.checkpoints.prefixes import StateDict, find_models, guess_models, move
from vmamba_mm.errors import UserError
from vmamba_mm.families.names import is_of_trainer, plain_name
from vmamba_mm.zoo import config_for

_TASKS = {'cls': 'a classifier', 'det': 'a detector', 'seg': 'a segmentor',
          'backbone': 'a backbone alone'}


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
    """The same weights by the names of a model that may have its VMamba under another prefix.

    Wrappers of torch.compile, FSDP and activation checkpointing may be in the model, in the file
    or in both. What belongs to a trainer's loss or metric, and to nothing in the model, is left
    out.

    Args:
        state_dict: as :func:`vmamba_mm.checkpoints.files.read_checkpoint` gives it.
        expected: the model's own.
    """
    state = dict(state_dict)
    families = {p.family.name: p.family for p in guess_models(expected)}.values()
    family = next((f for f in families if find_models(state, f)), None)
    if family is None:
        return state
    if not set(expected) <= set(state):
        own_names = {plain_name(k): k for k in expected}
        expected_models = find_models(own_names, family)
        if not set(expected_models) <= set(find_models(state, family)):
            state = to_mm(state, family=family)
            held_models = find_models(state, family)
            if len(expected_models) == len(held_models) == 1:
                state = move(state, held_models[0].prefix, expected_models[0].prefix)
        state = {own_names.get(plain_name(k), k): v for k, v in state.items()}
    return {k: v for k, v in state.items() if k in expected or not is_of_trainer(k)}


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
        weight: (C, I, k, k), or of any other number of dimensions of kernels.
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
        values = torch.cat([values] * math.ceil(in_channels / held), dim=1)[:, :in_channels]
        values = values * (held / in_channels)
    else:
        raise UserError(f'a stem of {held} channels cannot be adapted to {in_channels}: only '
                        'weights for 1 or 3 channels can, or any to 1')
    return values.to(weight.dtype)


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def require_equal(expected: StateDict, found: StateDict, name: str) -> None:
    """Raise one line unless all weights of a model are there, of its shapes, and nothing else is.

    Args:
        expected, found, name: as of :func:`explain_differences`.

    Raises:
        UserError: with the first differences, and what the file holds in place of the model.
    """
    if wrong := differences(expected, found):
        raise UserError(explain_differences(wrong, expected, found, name))


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
    firsts = [p.prefix + name for p in guess_models(expected) for name in p.family.first_convs]
    shown += ["give adapt_in_channels=True to the backbone's load_pretrained, or to its "
              "init_cfg=dict(type='Pretrained', ...), to adapt the stem from "
              f'{found[key].shape[1]} to {expected[key].shape[1]} channels'
              for key in firsts if key in expected and key in found
              and _differ_in_channels(_shape(expected[key]), _shape(found[key]))]
    return f'{name} does not fit the model: {_mix_up(expected, found)}{"; ".join(shown)}'


def _differ_in_channels(ours, theirs):
    """Whether two shapes of a first convolution differ in the channels of images alone."""
    return len(ours) == len(theirs) > 2 and ours[1] != theirs[1] \
        and ours[:1] + ours[2:] == theirs[:1] + theirs[2:]


def _mix_up(expected, found):
    """Say what the file holds in place of the model, for a message; '' if only names differ."""
    expected_models = guess_models(expected)
    if not expected_models:
        return ''
    family = expected_models[0].family
    held_models = find_models(found, family)
    if not held_models:
        other = f' but {describe_places(found)}' if guess_models(found) else ''
        return f'it holds no {family.model} backbone{other}; '
    if not {p.prefix for p in expected_models} & {p.prefix for p in held_models}:
        return (f'it holds {describe_places(found, family)}, the model has its own under '
                f'{expected_models[0].prefix!r}; ')
    try:
        wanted_arch, held_arch = infer_arch(expected, family), infer_arch(found, family)
    except UserError:
        return ''
    task, its_task = (infer_task(to_mm(state, family=family)) for state in (expected, found))
    if wanted_arch == held_arch:
        if task == its_task or 'backbone' in (task, its_task):
            return ''
        return f'it holds {_TASKS[its_task]}, and the model is {_TASKS[task]}; '
    if isinstance(held_arch, dict):
        return f'it holds the arch {held_arch}, and the model has another; '
    model = f"is {wanted_arch!r}" if isinstance(wanted_arch, str) else 'has another'
    # Names do not tell a classifier of clips or clouds from one of images; the architecture does.
    tasks = ('cls', 'video', 'points') if task == 'cls' else (task,)
    config = next(filter(None, (config_for(family.name, held_arch, t) for t in tasks)), None)
    how = f'use {config}' if config else f'build it with arch={held_arch!r}'
    return f'it holds the arch {held_arch!r}, and the model {model}: {how}; '
