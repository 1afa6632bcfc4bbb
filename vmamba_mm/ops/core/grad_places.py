"""Where the gradients of parameters go, if somebody has prepared memory for them.

``DistributedDataParallel`` exchanges gradients in buckets, and copies each gradient into its bucket
by a launch of its own: a model of 30 M parameters has some 300. An op that writes a gradient at its
place in the bucket saves that. Nothing depends on it: a gradient that lies elsewhere is copied.

:func:`vmamba_mm.layers.parallel.share_buckets` offers places; ops take them by :func:`new_grad`.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNED = 16  # bytes, as kernels and matrix products expect


class Places:
    """Memory for the gradients of a model's parameters. Each is given out once after a
    :meth:`renew`: of a parameter that is used twice, autograd adds two gradients, which must not
    lie in the same memory."""

    def __init__(self):
        self._turn = 0
        self._numbers: list[int] = []
        weakref.finalize(self, _forget, self._numbers)

    def offer(self, parameters: Iterable[Tensor], views: Iterable[Tensor]) -> None:
        """Places of the form of these parameters, which replace those offered before."""
        for parameter, view in zip(parameters, views, strict=True):
            if (view.shape, view.dtype, view.device) == (
                    parameter.shape, parameter.dtype, parameter.device) \
                    and view.is_contiguous() and parameter.is_contiguous() \
                    and view.data_ptr() % _ALIGNED == 0:
                _places[id(parameter)] = _Place(self, parameter, view)
                self._numbers.append(id(parameter))
            else:
                _places.pop(id(parameter), None)

    def renew(self) -> None:
        """All places are free again."""
        self._turn += 1


class _Place:
    def __init__(self, places: Places, parameter: Tensor, view: Tensor):
        self._places, self._parameter = weakref.ref(places), weakref.ref(parameter)
        self._view, self._turn = view, -1

    def take(self, parameter: Tensor) -> Tensor | None:
        """The memory; None if it was given out, is in use as ``grad``, or is not this one's."""
        places = self._places()
        if places is None or self._turn == places._turn or self._parameter() is not parameter \
                or parameter.grad is not None or torch.is_grad_enabled():
            return None
        self._turn = places._turn
        # A tensor that nobody else holds: autograd clones one that it does not own.
        return self._view.detach()


#: By the id of the parameter, which a place checks: ids come again.
_places: dict[int, _Place] = {}


def _forget(numbers: list[int]) -> None:
    for number in numbers:
        place = _places.get(number)
        if place is not None and place._places() is None:
            del _places[number]


def new_grad(parameter: Tensor) -> Tensor:
    """Memory for the gradient by ``parameter``, of which the caller writes every element."""
    if _places:
        place = _places.get(id(parameter))
        if place is not None:
            memory = place.take(parameter)
            if memory is not None:
                return memory
    return torch.empty_like(parameter)
