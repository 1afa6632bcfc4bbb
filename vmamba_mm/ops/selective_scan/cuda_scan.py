"""Launches of the kernels in ``kernels/scan1d``, on addresses, for selective_scan and mamba_inner.

A sequence is one of (B, K): D channels over L positions. Either the channels of a position are
adjacent in memory (``last``), or the positions of a channel. ``kernels/README.md`` says how the
kernels work. fp16 and fp32 need sm_75, bf16 sm_80.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    Slab,
    cached,
    device_limits,
    kernel,
)

MOST_STATES = 128
_THREADS = 128
RUN, STATES, GRADIENTS = range(3)  # modes of the forward kernel, as in scan1d.cuh


# --- what is compiled -------------------------------------------------------------------------

def _flags(*flags: bool) -> str:
    return ', '.join(str(flag).lower() for flag in flags)


def lanes_of(state: int) -> tuple[int, int]:
    """(states of a lane, lanes) of the kernels for N states, or for fewer."""
    if state <= 4:
        return (1, 2, 4, 4)[state - 1], 1
    return 4, next(n for n in (2, 4, 8, 16, 32) if 4 * n >= state)


def forward_instance(type_: str, states: int, lanes: int, last: bool, vector: bool, mode: int
                     ) -> Instance:
    """``mode`` is RUN, STATES or GRADIENTS."""
    return Instance('scan1d/scan1d_fwd.cu',
                    f'scan1d_fwd<{type_}, {states}, {lanes}, {_flags(last, vector)}, {mode}>')


def relay_instance(type_: str, vector: bool, back: bool) -> Instance:
    return Instance('scan1d/scan1d_relay.cu', f'scan1d_relay<{type_}, {_flags(vector, back)}>')


def backward_instance(type_: str, states: int, lanes: int, last: bool, vector: bool) -> Instance:
    return Instance('scan1d/scan1d_bwd.cu',
                    f'scan1d_bwd<{type_}, {states}, {lanes}, {_flags(last, vector)}>')


def combine_instance() -> Instance:
    return Instance('scan1d/scan1d_combine.cu', 'scan1d_combine')


def finish_instance() -> Instance:
    return Instance('scan1d/scan1d_finish.cu', 'scan1d_finish')


# Type, N, last, vector: those that published models use, and one for each kind beside them.
_COMPILED = [('Half', 16, False, False), ('Half', 16, True, True), ('BFloat', 16, False, True),
             ('Float', 16, True, True), ('Float', 1, False, True), ('Float', 64, True, False)]

#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **{forward_instance('Half', 4 // more, 4 * more, False, True, RUN): 75 for more in (2, 4)},
    **{instance: 80 if type_ == 'BFloat' else 75 for type_, state, *memory in _COMPILED
       for instance in (*(forward_instance(type_, *lanes_of(state), *memory, mode)
                          for mode in range(3)),
                        backward_instance(type_, *lanes_of(state), *memory))},
    **{relay_instance(*which): 80 for which in (
        ('Half', True, False), ('Half', False, True), ('BFloat', True, True),
        ('Float', True, False), ('Float', False, True))},
    combine_instance(): 75, finish_instance(): 75}


# --- sizes ------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    """``dim``: channels of one of the ``routes`` (K); ``reverse``: a bit for each of them."""
    batch: int
    routes: int
    dim: int
    length: int
    state: int
    reverse: int = 0

    @property
    def channels(self) -> int:
        return self.routes * self.dim


class Strides(NamedTuple):
    """Of a map, in elements: from a sample and a route to the next, and from a position
    (``last``) or a channel."""
    b: int
    k: int
    s: int


class RowStrides(NamedTuple):
    """Of B or C, in elements."""
    b: int
    k: int
    n: int
    l: int  # noqa: E741


class Tile(NamedTuple):
    """As the struct Shape in scan1d.cuh."""
    states: int
    lanes: int
    channels: int
    steps: int

    @classmethod
    def of(cls, state: int, more: int = 1) -> 'Tile':
        """``more``: lanes of fewer states, for more threads."""
        states, lanes = lanes_of(state)
        lanes *= more
        return cls(states // more, lanes, 2 * _THREADS // lanes, min(4 * lanes, 16))

    @property
    def width(self) -> int:
        """Columns of B and C together."""
        return 2 * self.states * self.lanes

    @property
    def forward_shared(self) -> int:
        """Bytes of shared memory of a block."""
        return 4 * (self.steps * (2 * self.channels + 4 + self.width + 4) + 2 * self.channels)

    @property
    def backward_shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.forward_shared + 4 * (
            self.steps * (self.channels + 2) + self.steps // 4 * 2 * _THREADS * self.states
            + _THREADS // 32 * self.steps * self.width + 2 * 8 * _THREADS)


class Plan(NamedTuple):
    """How sequences are divided: the tile, steps of a span, spans; and into how many parts a span
    is divided where only what it does to the state is found."""
    tile: Tile
    span: int
    spans: int
    parts: int = 1

    @classmethod
    def of(cls, tile: Tile, length: int, spans: int, parts: int = 1) -> 'Plan':
        tiles = -(-length // tile.steps)
        tiles_of_span = -(-tiles // (spans * parts)) * parts
        return cls(tile, tiles_of_span * tile.steps, -(-tiles // tiles_of_span), parts)


max_span = None  # for tests, which then ``forget``: steps of a span at most
relay: bool | None = None  # whether warps take turns (scan1d_relay.cu); None: where it is quicker
_BACKWARD_BLOCKS = 3  # of a multiprocessor, as in the launch bounds
# Instructions of a state and step in the forward, by how many times more lanes than usual share
# the states of a channel; of what finds the states that enter spans; and of two more launches.
_INSTRUCTIONS = {1: 9, 2: 11.5, 4: 17}
_OF_ENDS, _OF_LAUNCHES = 6.7, 6e4
# As in scan1d_relay.cu: channels of a block, steps of a tile; instructions of a state and step.
_RELAY_CHANNELS, _RELAY_STEPS, _OF_RELAY = 16, 8, 10
_RELAY_SHARED = 4 * (4 * (4 * 72 + 8 * 36 + 2 * 256 + 128) + 4 * 2)  # bytes
# The time of a block where a multiprocessor has 1 to 5 of them, as measured on an H200.
_OF_BLOCK = 1.82, 1.32, 1, 0.965, 0.94


def _has_vectors(dtype: torch.dtype, sizes: Sizes, last: bool) -> bool:
    """Whether maps may be read in vectors, of 8 or 4 channels or of 4 positions."""
    return not (sizes.dim if last else sizes.length) % (8 if last and dtype != torch.float32 else 4)


def _forward_blocks(index: int, dtype: torch.dtype, sizes: Sizes, last: bool) -> int:
    """Blocks of a multiprocessor, as in the launch bounds of scan1d_fwd.cu."""
    many = _has_vectors(dtype, sizes, last) and not last and dtype != torch.float32
    return (5 if many else 4) - (torch.cuda.get_device_capability(index) < (8, 0))


def _time(multiprocessors: int, most: int, blocks: int, work: float) -> float:
    """In no unit, for blocks of so much work, of which a multiprocessor has at ``most`` so many at
    a time. The fullest one decides."""
    full, rest = divmod(blocks, multiprocessors * most)
    rest = -(-rest // multiprocessors)
    return work * (full * most * _OF_BLOCK[most - 1] + rest * _OF_BLOCK[rest - 1])


def _cost(multiprocessors: int, most: int, sizes: Sizes, plan: Plan, more: int) -> float:
    """The time of a forward, in no unit."""
    channels = plan.tile.channels
    blocks = sizes.batch * sizes.routes * -(-sizes.dim // channels)
    cost = _time(multiprocessors, most, blocks * plan.spans,
                 channels * plan.span * _INSTRUCTIONS[more])
    if plan.spans > 1:
        cost += _OF_LAUNCHES + _time(
            multiprocessors, most, blocks * (plan.spans - 1) * plan.parts,
            channels * plan.span / plan.parts * _OF_ENDS)
    return cost


def forward_plan(index: int, sizes: Sizes, most: int = 5) -> Plan:
    """Few sequences are divided into spans, of which all but the last are scanned twice, or a
    channel's states among more lanes. A multiprocessor has at ``most`` so many blocks."""
    multiprocessors = device_limits(index)[0]
    plain = Tile.of(sizes.state)
    if max_span:
        return Plan.of(plain, sizes.length, -(-sizes.length // max_span), 2)
    blocks = sizes.batch * sizes.routes * -(-sizes.dim // plain.channels)
    tiles = -(-sizes.length // plain.steps)
    plans = [(Plan.of(plain, sizes.length, 1), 1)]
    for each in range(1, most + 1):
        spans = min(each * multiprocessors // blocks, tiles // 4)
        if spans > 1:
            plans += [(Plan.of(plain, sizes.length, spans, parts), 1) for parts in (1, 2, 4)]
    if 8 < sizes.state <= 16:
        plans += [(Plan.of(Tile.of(sizes.state, more), sizes.length, 1), more) for more in (2, 4)]
    return min(plans, key=lambda plan: _cost(multiprocessors, most, sizes, *plan))[0]


def _is_relayed(index: int, dtype: torch.dtype, sizes: Sizes, most: int, plan: Plan) -> bool:
    """Whether a forward by scan1d_relay.cu takes less time than by ``plan``."""
    if relay is not None:
        return relay
    multiprocessors = device_limits(index)[0]
    blocks = sizes.batch * sizes.routes * -(-sizes.dim // _RELAY_CHANNELS)
    # As in the launch bounds.
    at_a_time = 3 if (dtype != torch.float32 and sizes.length % 4 == 0
                      and torch.cuda.get_device_capability(index) >= (9, 0)) else 2
    more = plan.tile.lanes // lanes_of(sizes.state)[1]
    return (_time(multiprocessors, at_a_time, blocks, _RELAY_CHANNELS * sizes.length * _OF_RELAY)
            < _cost(multiprocessors, most, sizes, plan, more))


def backward_plan(index: int, sizes: Sizes) -> Plan:
    """Few sequences are divided into spans."""
    tile = Tile.of(sizes.state)
    tiles = -(-sizes.length // tile.steps)
    blocks = sizes.batch * sizes.routes * -(-sizes.dim // tile.channels)
    slots = device_limits(index)[0] * _BACKWARD_BLOCKS
    spans = max(1, min(slots // blocks, tiles // 4)) if 5 * blocks < 2 * slots else 1
    if max_span:
        spans = -(-sizes.length // max_span)
    return Plan.of(tile, sizes.length, spans)


class Types(NamedTuple):
    """Of the parameters: None for one that there is not."""
    A: torch.dtype
    D: torch.dtype | None
    bias: torch.dtype | None


class _Variants(dict):
    """The launch of a kernel by whether it reads maps in vectors, bound when first asked for."""

    def __init__(self, bind: Callable[[bool], Callable[..., None]]):
        super().__init__()
        self._bind = bind

    def __missing__(self, vector: bool) -> Callable[..., None]:
        self[vector] = launch = self._bind(vector)
        return launch


class _Scan:
    """What the launches for such sizes share."""

    def __init__(self, index: int, dtype: torch.dtype, sizes: Sizes, last: bool, types: Types,
                 softplus: bool, plan: Plan):
        self.index, self.type, self.sizes, self.last = index, TYPES[dtype], sizes, last
        self.tile, self.span, self.spans, self.parts = plan
        self.tiles = -(-sizes.length // self.tile.steps)
        self.columns = -(-sizes.dim // self.tile.channels)
        self.blocks = sizes.batch * sizes.routes * self.columns * self.spans
        self.A_type = CODES[types.A]
        self.constants = dict(
            dim=sizes.dim, length=sizes.length, state=sizes.state, routes=sizes.routes,
            reverse=sizes.reverse, columns=self.columns, span=self.span, spans=self.spans,
            tiles=self.tiles, softplus=int(softplus), A_type=self.A_type,
            D_type=CODES.get(types.D, 0), bias_type=CODES.get(types.bias, 0))
        self.vectors = _has_vectors(dtype, sizes, last)

    def sums_size(self, spans: int | None = None) -> int:
        """Elements of a number for each channel of each span."""
        return self.sizes.batch * (spans or self.spans) * self.sizes.channels

    def entries_size(self, spans: int | None = None) -> int:
        """Elements of the states of each span."""
        return self.sums_size(spans) * self.sizes.state

    def bind(self, mode: int | None, strides: dict[str, Strides], rows: dict[str, RowStrides],
             y_dtype: torch.dtype, parts: bool = False) -> _Variants:
        """Launches of the forward in ``mode``, or of the backward for None; with ``parts`` of the
        parts of all spans but the last."""
        constants, blocks = dict(self.constants, y_type=CODES[y_dtype]), self.blocks
        if parts:
            spans = (self.spans - 1) * self.parts
            constants.update(span=self.span // self.parts, spans=spans)
            blocks = blocks // self.spans * spans
        for name in ('u', 'delta', 'z', 'y', 'grad', 'du', 'ddelta', 'dz'):
            values = strides.get(name, Strides(0, 0, 0))
            constants.update({f'{name}_{side}': v for side, v in values._asdict().items()})
        for name in ('B', 'C'):
            constants.update({f'{name}_{side}': v for side, v in rows[name]._asdict().items()})
        instance, shared = forward_instance, self.tile.forward_shared
        if mode is None:
            instance, shared = backward_instance, self.tile.backward_shared
        more = () if mode is None else (mode,)
        return _Variants(lambda vector: kernel(
            self.index, instance, self.type, self.tile.states, self.tile.lanes, self.last, vector,
            *more).bind((blocks, 1, 1), (_THREADS, 1, 1), shared, **constants))

    def combine(self, parts: int, of_span: int, back: bool) -> Callable[..., None]:
        sizes = self.sizes
        count = sizes.batch * sizes.channels * sizes.state
        return kernel(self.index, combine_instance).bind(
            (-(-count // 128), 1, 1), (128, 1, 1), batch=sizes.batch, channels=sizes.channels,
            state=sizes.state, parts=parts, spans=self.spans, of_span=of_span, A_type=self.A_type,
            back=int(back))


class Launch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs."""
    run: Callable[..., None]
    memory: int


@cached
def forward_launch(index: int, dtype: torch.dtype, sizes: Sizes, last: bool, types: Types,
                   softplus: bool, strides: tuple[tuple[str, Strides], ...], B: RowStrides,
                   C: RowStrides, y_dtype: torch.dtype) -> Launch:
    """The forward of such sequences.

    It takes the addresses of u, delta, A, B, C, y and memory, and, 0 for none, of D, bias, z,
    start (the initial state) and end (the final one; (B, K * D, N), fp32), and of states
    (:func:`states_size`), which are given only with a backward's division into spans.
    """
    most = _forward_blocks(index, dtype, sizes, last)
    plan = forward_plan(index, sizes, most)
    # Warps can take turns where all maps lie in memory alike, as B and C do, positions adjacent.
    if (8 < sizes.state <= 16 and not last and B == C and B.l == 1 and not max_span
            and len({of for _, of in strides}) == 1 and B.n == strides[0][1].s
            and sizes.dim * sizes.length < 2**30
            and torch.cuda.get_device_capability(index) >= (8, 0)
            and _is_relayed(index, dtype, sizes, most, plan)):
        return _relay_launch(index, dtype, sizes, types, softplus, strides[0][1], B, y_dtype)
    scan = _Scan(index, dtype, sizes, last, types, softplus, plan)
    strides, rows, vectors = dict(strides), dict(B=B, C=C), scan.vectors
    run = scan.bind(RUN, strides, rows, y_dtype)
    slab = Slab()
    if scan.spans == 1:
        def launch_forward(u, delta, A, B, C, y, memory, D=0, bias=0, z=0, start=0, end=0):
            run[vectors and (u | delta | z | y) % 16 == 0](
                u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, D=D, bias=bias, z_data=z,
                entries=start, last=end, y_data=y)

        return Launch(launch_forward, 0)

    parts = (scan.spans - 1) * scan.parts
    ends_at, sums_at = slab.take(scan.entries_size(parts)), slab.take(scan.sums_size(parts))
    entries_at = slab.take(scan.entries_size())
    summarise = scan.bind(STATES, strides, rows, y_dtype, parts=True)
    combine = scan.combine(parts, scan.parts, back=False)

    def launch_in_spans(u, delta, A, B, C, y, memory, D=0, bias=0, z=0, start=0, end=0):
        ends, sums, entries = memory + ends_at, memory + sums_at, memory + entries_at
        vector = vectors and (u | delta | z | y) % 16 == 0
        summarise[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias,
                          ends=ends, sums=sums)
        combine(ends=ends, sums=sums, before=start, A=A, entries=entries)
        run[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, D=D, bias=bias, z_data=z,
                    entries=entries, last=end, y_data=y)

    return Launch(launch_in_spans, slab.size)


def _relay_launch(index: int, dtype: torch.dtype, sizes: Sizes, types: Types, softplus: bool,
                  of: Strides, row: RowStrides, y_dtype: torch.dtype) -> Launch:
    columns = -(-sizes.dim // _RELAY_CHANNELS)
    size, together = dtype.itemsize, 4  # elements that a lane reads at once
    vectors = not any(n % together for n in (sizes.length, *of, row.b, row.k))
    run = _Variants(lambda vector: kernel(
        index, relay_instance, TYPES[dtype], vector, bool(sizes.reverse)).bind(
            (sizes.batch * sizes.routes * columns, 1, 1), (_THREADS, 1, 1), _RELAY_SHARED,
            b=of.b, k=of.k, s=of.s, row_b=row.b, row_k=row.k, dim=sizes.dim, length=sizes.length,
            state=sizes.state, routes=sizes.routes, columns=columns,
            tiles=-(-sizes.length // _RELAY_STEPS), softplus=int(softplus), y_type=CODES[y_dtype],
            A_type=CODES[types.A], D_type=CODES.get(types.D, 0),
            bias_type=CODES.get(types.bias, 0)))

    def launch_relay(u, delta, A, B, C, y, memory, D=0, bias=0, z=0, start=0, end=0):
        run[vectors and (u | delta | B | C | y | z) % (size * together) == 0](
            u=u, delta=delta, A=A, B=B, C=C, D=D, bias=bias, z=z, first=start, last=end, y=y)

    return Launch(launch_relay, 0)


@cached
def backward_launch(index: int, dtype: torch.dtype, sizes: Sizes, last: bool, types: Types,
                    softplus: bool, strides: tuple[tuple[str, Strides], ...], B: RowStrides,
                    C: RowStrides, dB: RowStrides, dC: RowStrides,
                    BC_types: tuple[torch.dtype, torch.dtype], gated: bool) -> Launch:
    """The backward of such sequences; with ``gated`` it calculates the result before the gate
    again, with the strides of ``y``.

    It takes the addresses of u, delta, A, B, C, grad, du, ddelta, dA, dB, dC and memory, and, 0 for
    none, of D, bias, z, start, dD, dbias, dz, y (``gated``: memory for the result before the
    gate), end_grad (the gradient by the final state) and start_grad (that by the initial one).
    Gradients have the types of what they are by.
    """
    scan = _Scan(index, dtype, sizes, last, types, softplus, backward_plan(index, sizes))
    tile, strides, rows = scan.tile, dict(strides), dict(B=B, C=C)
    channels, states, width, vectors = sizes.channels, sizes.state, tile.width, scan.vectors
    slab, divided = Slab(), scan.spans > 1
    states_at = slab.take(sizes.batch * scan.tiles * channels * states)
    BC_at = slab.take(scan.columns * sizes.batch * sizes.routes * sizes.length * width)
    A_at, D_at = slab.take(scan.entries_size()), slab.take(2 * scan.sums_size())
    if divided:
        cums_at = slab.take(sizes.batch * scan.tiles * channels)
        ends_at, sums_at = slab.take(scan.entries_size()), slab.take(scan.sums_size())
        entries_at, grad_entries_at = slab.take(scan.entries_size()), slab.take(scan.entries_size())
        find_gradients = scan.bind(GRADIENTS, strides, rows, dtype)
        combine, combine_back = (scan.combine(scan.spans, 1, back) for back in (False, True))
    find_states = scan.bind(STATES, strides, rows, dtype)
    find_y = scan.bind(RUN, strides, rows, dtype) if gated else None
    run = scan.bind(None, strides, rows, dtype)

    parameters = -(-channels * (states + 2) // 32)
    blocks = sizes.batch * sizes.routes * -(-sizes.length // 32)
    fields = {f'{name}_{side}': value for name, of in (('B', dB), ('C', dC))
              for side, value in of._asdict().items()}
    finish = kernel(index, finish_instance).bind(
        (parameters + blocks, 1, 1), (256, 1, 1), 4 * max(256, 32 * (width + 1)),
        parts=sizes.batch * scan.spans, channels=channels, state=states, columns=scan.columns,
        batch=sizes.batch, routes=sizes.routes, length=sizes.length, slots=width,
        lane_states=tile.states, parameter_blocks=parameters, A_type=scan.A_type,
        D_type=CODES.get(types.D, 0), bias_type=CODES.get(types.bias, 0),
        B_type=CODES[BC_types[0]], C_type=CODES[BC_types[1]], **fields)

    def launch_backward(u, delta, A, B, C, grad, du, ddelta, dA, dB, dC, memory, D=0, bias=0, z=0,
                        start=0, dD=0, dbias=0, dz=0, y=0, end_grad=0, start_grad=0):
        states = memory + states_at
        vector = vectors and (u | delta | z | y | grad | du | ddelta | dz) % 16 == 0
        cums, entries, grad_entries = 0, start, end_grad
        if divided:
            ends, sums, cums = memory + ends_at, memory + sums_at, memory + cums_at
            entries, grad_entries = memory + entries_at, memory + grad_entries_at
            find_states[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias,
                                states=states, cums=cums, ends=ends, sums=sums)
            combine(ends=ends, sums=sums, before=start, A=A, entries=entries)
            find_gradients[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias,
                                   grad_data=grad, z_data=z, ends=ends, sums=sums)
            combine_back(ends=ends, sums=sums, before=end_grad, A=A, entries=grad_entries)
        if gated:
            find_y[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias,
                           entries=entries, D=D, y_data=y, states=0 if divided else states)
        elif not divided:
            find_states[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias,
                                entries=entries, states=states)
        run[vector](u_data=u, delta_data=delta, A=A, B_data=B, C_data=C, bias=bias, grad_data=grad,
                    z_data=z, y_data=y, D=D, du_data=du, ddelta_data=ddelta, dz_data=dz,
                    states=states, cums=cums, entries=entries, grad_entries=grad_entries,
                    first_grad=start_grad, BC_parts=memory + BC_at, A_parts=memory + A_at,
                    D_parts=memory + D_at)
        finish(A_parts=memory + A_at, D_parts=memory + D_at, BC_parts=memory + BC_at, A=dA, D=dD,
               bias=dbias, B=dB, C=dC)

    return Launch(launch_backward, slab.size)


@cached
def why_not_on(index: int, dtype: torch.dtype, state: int) -> str | None:
    """The reason why the GPU ``index`` cannot run the kernels, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability < ((8, 0) if dtype == torch.bfloat16 else (7, 5)):
        return f'a GPU of compute capability {capability} is too old for {dtype}'
    if state > MOST_STATES:
        return f'N is {state}; the kernels take at most {MOST_STATES}'
    shared = Tile.of(state).backward_shared
    if shared > device_limits(index)[2]:
        return f'N={state} needs {shared} bytes of shared memory, more than this GPU has'
    return None
