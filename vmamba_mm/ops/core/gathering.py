"""Weights of a block: a tuple for Python, and arguments of their own for an op."""

import functools
from collections.abc import Callable


def gather_into(kind: type[tuple]) -> Callable[[Callable], Callable]:
    """A decorator, which calls ``function(x, weights, ...)`` with the fields of the named tuple
    ``kind`` given as arguments of their own: autograd does not look for tensors in a tuple."""
    size = len(kind._fields)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def gathered(x, *args):
            return function(x, kind._make(args[:size]), *args[size:])

        return gathered

    return decorate
