"""Our models, built and loaded for a comparison, and their weights by official names."""

import functools
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import differences
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.errors import UserError
from vmamba_mm.families import Family
from vmamba_mm.families.names import has_row, rename
from vmamba_mm.families.parity import Build, Size, Subject


def build(spec: Build, case: Mapping[str, Any] | None = None) -> Any:
    """A module, or a function with its keyword arguments.

    Args:
        spec: of it.
        case: of a layer, whose tensors have the sizes that ``spec`` asks for.
    """
    target = pkgutil.resolve_name(spec.target)
    kwargs = {k: build(v, case) if isinstance(v, Build) else
              case[v.tensor].shape[v.dim] if isinstance(v, Size) else v
              for k, v in spec.kwargs.items()}
    return target(**kwargs) if inspect.isclass(target) else functools.partial(target, **kwargs)


def family_in(model: nn.Module) -> Family | None:
    """The family of the backbone that a model is, or has; a system may have several."""
    return next((module.family for module in model.modules()
                 if isinstance(getattr(module, 'family', None), Family)), None)


def load(model: nn.Module, family: Family, subject: Subject, path: Path) -> None:
    """Load a checkpoint as users do, strictly.

    Raises:
        UserError: if it does not fit.
    """
    model = model.get_submodule(subject.into)
    if subject.convert is not None:
        content = read_content(path)
        for key in subject.within:
            if not isinstance(content, Mapping) or key not in content:
                raise UserError(f'{path.name} holds nothing under {".".join(subject.within)}')
            content = content[key]
        load_state(model, subject.convert(content), path.name)
    elif hasattr(model, 'load_pretrained'):
        model.load_pretrained(str(path), **subject.load)
    else:
        checkpoint = read_checkpoint(path, family=family, **subject.load)
        load_state(model, checkpoint.get('state_dict', checkpoint), path.name)


def load_state(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    wrong = differences(model.state_dict(), state)
    if wrong:
        shown = '; '.join(f'{k} {v}' for k, v in list(wrong.items())[:3])
        raise UserError(f'{name} does not fit the model: {shown}'
                        + (f'; {len(wrong) - 3} more' if len(wrong) > 3 else ''))
    model.load_state_dict(state)


class OfficialNames:
    """Our parameters and buffers in the official layout.

    Each element of the official weights gets a number, the numbers go through the conversion that
    loads the weights, and come to lie where our elements are.

    Args:
        model: ours.
        convert: (weights by official names, our model's own) -> by our names.
        shapes: of the official weights.
    """

    def __init__(self, model: nn.Module, convert: Callable, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.start, numbers, total = {}, {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            numbers[name] = torch.arange(total, total + count, dtype=torch.float64).view(shape)
            self.start[name], total = total, total + count
        self.total = total
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        converted = convert(numbers, tensors) if numbers else {}
        self.numbers = {k: v.long().flatten() for k, v in converted.items()}
        covered = {id(tensors[k]) for k in self.numbers if k in tensors}
        #: names of our trained parameters that no official weight belongs to
        self.left = [k for k, p in model.named_parameters()
                     if p.requires_grad and id(p) not in covered]

    def arrange(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The values by official names; None where ours lacks some of a weight's elements."""
        flat = torch.zeros(self.total, dtype=torch.float64)
        is_set = torch.zeros(self.total, dtype=torch.bool)
        for key, numbers in self.numbers.items():
            value = values.get(key)
            if value is not None and value.numel() == numbers.numel():
                flat[numbers] = value.detach().double().cpu().flatten()
                is_set[numbers] = True
        arranged = {}
        for name, shape in self.shapes.items():
            part = slice(self.start[name], self.start[name] + math.prod(shape))
            arranged[name] = flat[part].view(shape) if is_set[part].all() else None
        return arranged


def convert_names(family: Family, subject: Subject, state: Mapping[str, Any],
                  our_names: Collection[str]) -> dict[str, Any]:
    """Official weights, or gradients, by our names: by the subject's way, or by the family's rows.

    Args:
        our_names: names of our model, whose backbone may lie at ``backbone.`` or be all of it.
    """
    if subject.convert is not None:
        return dict(subject.convert(state))
    plain = {k.removeprefix(family.place).removeprefix('backbone.'): v for k, v in state.items()}
    rows, renamed = family.all_rows(plain), {}
    for name, value in plain.items():
        ours = rename(name, rows) if has_row(name, rows) else name
        if ours is not None:
            renamed[f'backbone.{ours}' if f'backbone.{ours}' in our_names else ours] = value
    return renamed


def official_shapes(cases: list[Mapping], checkpoint: Any) -> dict[str, tuple[int, ...] | None]:
    """Shapes of all weights that the cases name.

    Those of gradients that are stored in part, or not at all, are in the checkpoint; None if it
    has no such weight.
    """
    shapes = {}
    for case in cases:
        groups = [v for k, v in case.items() if isinstance(v, Mapping)
                  and str(k).startswith(('grad_params', 'buffers_after'))]
        for name, value in (item for group in groups for item in group.items()):
            if isinstance(value, Tensor):
                shapes[name] = tuple(value.shape)
            elif name not in shapes:
                tensor = find_tensor([checkpoint], name)
                shapes[name] = None if tensor is None else tuple(tensor.shape)
    return shapes


def find_tensor(contents: list[Any], name: str) -> Tensor | None:
    """A tensor of this name, whatever stands before it, in nested dicts; the first of several."""
    for content in contents:
        if not isinstance(content, Mapping):
            continue
        for key, value in content.items():
            if isinstance(value, Tensor) and (key == name or str(key).endswith(f'.{name}')):
                return value
        tensor = find_tensor(list(content.values()), name)
        if tensor is not None:
            return tensor
    return None
