"""Which form of the ops a graph is recorded in: nodes of our own, or plain PyTorch.

A graph that is recorded for another runtime cannot hold our ops. While a table of forms is in use,
a call of an op runs its form, where it has one, in place of an implementation.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

#: By the name of an op, what a call of it runs; from the op's arguments, without ``backend`` and
#: ``save``, to the results that have a gradient.
Forms = Mapping[str, Callable]

active: Forms | None = None


@contextlib.contextmanager
def use(forms: Forms) -> Iterator[None]:
    """Calls of ops run these forms."""
    global active
    before, active = active, forms
    try:
        yield
    finally:
        active = before
