"""Recurrences in plain PyTorch, which the forms of the ops are made of.

Each is a loop over one dimension of dense steps, on all that is beside it at once. There are three
ways to record one: as steps one after the other, whose number is then that of the example
('unrolled'); as an op of a library in C++, which ``vmamba_mm.integrations.export.native`` opens,
for AOTInductor ('native'); and as an op that the exporter of another runtime translates to a loop
of its own: along any dimension ('node'), or along the first one, to which the forms then turn the
maps, for runtimes that are slow where a step's memory has gaps ('first'; 'native' does that too).
PyTorch has an operator of a loop, but Inductor of torch 2.14 makes C++ of it that does not compile.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

WAYS = 'unrolled', 'native', 'node', 'first'

#: An exponent below all: in place of minus infinity, of which a difference is NaN.
LOW = -1e30

_NODES = 'node', 'first'

_way = WAYS[0]


@contextlib.contextmanager
def record_as(way: str) -> Iterator[None]:
    """Recurrences are recorded in one of :data:`WAYS`."""
    global _way
    if way not in WAYS:
        raise ValueError(f'way={way!r} does not exist; choose one of {WAYS}')
    before, _way = _way, way
    try:
        yield
    finally:
        _way = before


def turns_maps() -> bool:
    """Whether a map that is scanned has the dimension of the scan first."""
    return _way in ('native', 'first')


def scan_lines(a: Tensor, x: Tensor, dim: int, reverse: bool
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``h_t = a_t h_(t-1) + x_t`` from zero along ``dim``, and the products of ``a`` so far.

    Args:
        a, x: of one shape.
        reverse: from the last position to the first.

    Returns:
        The states and the products, of the shape of ``x``; and the last ones of both, without
        ``dim``.
    """
    if _way in _NODES:
        return _lines_node(a, x, dim, reverse)
    if _way == 'native':
        *maps, h, p = torch.ops.vmamba_mm_native.lines(*_first(dim, a, x), reverse)
        return *(t.movedim(0, dim) for t in maps), h, p
    zero = torch.zeros_like(x.select(dim, 0))
    (h, p), (states, products) = _run(_line_step, (zero, zero + 1), (a, x), dim, reverse)
    return states, products, h, p


def scan_carries(a: Tensor, x: Tensor, dim: int, reverse: bool) -> Tensor:
    """The states of ``h_t = a_t h_(t-1) + x_t`` before each position, from zero along ``dim``; a
    dimension of ``a`` may be 1."""
    if _way in _NODES:
        return _carries_node(a, x, dim, reverse)
    if _way == 'native':
        return torch.ops.vmamba_mm_native.carries(*_first(dim, a, x), reverse).movedim(0, dim)
    return _run(_carry_step, (torch.zeros_like(x.select(dim, 0)),), (a, x), dim, reverse)[1][0]


def scan_states(a: Tensor, x: Tensor, dim: int, reverse: bool) -> Tensor:
    """The states of ``h_t = a_t h_(t-1) + x_t``, from zero along ``dim``."""
    if _way in _NODES:
        return _states_node(a, x, dim, reverse)
    if _way == 'native':
        return torch.ops.vmamba_mm_native.states(*_first(dim, a, x), reverse).movedim(0, dim)
    return _run(_state_step, (torch.zeros_like(x.select(dim, 0)),), (a, x), dim, reverse)[1][0]


def scan_means(decay: Tensor, k: Tensor, v: Tensor, dim: int, reverse: bool
               ) -> tuple[Tensor, Tensor, Tensor]:
    """What a mean of the values before each position is made of, with ``exp(k_i - (t - 1 - i)
    decay)`` for a weight: the sums of values and of weights over ``exp(p)``, and p.

    Args:
        decay: (C).
        k, v: of one shape, (..., C).
    """
    if _way in _NODES:
        return _means_node(decay, k, v, dim, reverse)
    if _way == 'native':
        found = torch.ops.vmamba_mm_native.means(decay, *_first(dim, k, v), reverse)
        return tuple(t.movedim(0, dim) for t in found)
    zero = torch.zeros_like(k.select(dim, 0))

    def step(before, now):
        (total, weights, top), (k, v) = before, now
        new = torch.maximum(top - decay, k)
        past, own = (top - decay - new).exp(), (k - new).exp()
        return (past * total + own * v, past * weights + own, new), before

    return _run(step, (zero, zero, zero + LOW), (k, v), dim, reverse)[1]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), which runtimes have as one operator, without the threshold of PyTorch."""
    return _softplus_node(x) if _way in _NODES else torch.nn.functional.softplus(x)


def _line_step(before, now):
    (h, p), (a, x) = before, now
    new = a * h + x, a * p
    return new, new


def _carry_step(before, now):
    (h,), (a, x) = before, now
    return (a * h + x,), (h,)


def _state_step(before, now):
    (h,), (a, x) = before, now
    new = a * h + x,
    return new, new


def _first(dim: int, *tensors: Tensor) -> list[Tensor]:
    """Without gaps, that dimension first."""
    return [t.movedim(dim, 0).contiguous() for t in tensors]


def _run(step, initial: tuple, inputs: tuple, dim: int, reverse: bool) -> tuple[tuple, tuple]:
    """The last states, and what the steps gave, side by side along ``dim``."""
    steps = list(zip(*(t.unbind(dim) for t in inputs), strict=True))
    states, outputs = initial, []
    for now in reversed(steps) if reverse else steps:
        states, output = step(states, now)
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return states, tuple(torch.stack(parts, dim) for parts in zip(*outputs, strict=True))


# --- nodes that an exporter translates ------------------------------------------------------------

def _unrolled(function, *args):
    with record_as('unrolled'):
        return function(*args)


def _node(name: str, schema: str, function, fake):
    op = torch.library.custom_op(f'vmamba_mm::{name}', lambda *args: _unrolled(function, *args),
                                 mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _without(x: Tensor, dim: int) -> Tensor:
    return x.new_empty([size for i, size in enumerate(x.shape) if i != dim])


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_lines_node = _node(
    'scan_lines', '(Tensor a, Tensor x, int dim, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)',
    scan_lines, lambda a, x, dim, reverse: (_like(x), _like(x), _without(x, dim), _without(x, dim)))
_carries_node = _node(
    'scan_carries', '(Tensor a, Tensor x, int dim, bool reverse) -> Tensor', scan_carries,
    lambda a, x, dim, reverse: _like(x))
_states_node = _node(
    'scan_states', '(Tensor a, Tensor x, int dim, bool reverse) -> Tensor', scan_states,
    lambda a, x, dim, reverse: _like(x))
_means_node = _node(
    'scan_means', '(Tensor decay, Tensor k, Tensor v, int dim, bool reverse) -> '
    '(Tensor, Tensor, Tensor)', scan_means,
    lambda decay, k, v, dim, reverse: (_like(k), _like(k), _like(k)))
_softplus_node = _node('softplus', '(Tensor x) -> Tensor', softplus, _like)
