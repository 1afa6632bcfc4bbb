"""Launches of the kernels in ``kernels/ssd``, on addresses.

A chunk is :data:`CHUNK` tokens. Where sequences are few and long, they are divided into spans of
chunks: one launch finds what each does to a state from zero, one what enters each, and the scan
runs from there. Where they are many and do not come out even over the multiprocessors, some are in
two parts, one after the other (:func:`cut_of`). ``kernels/README.md`` says how the kernels work.
They need sm_80.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    Slab,
    cached,
    device_limits,
    has_groups_of_warps,
    kernel,
    load,
)

CHUNK = 64  # Q in ssd.cuh
_BLOCK, _PAIRS = 16, 10  # BLOCK, Triangle::COUNT
STATES = 16, 32, 64, 128, 256  # N of the kernels
MOST_CHANNELS = 128
_LEAST_CUT = 8  # chunks of a sequence that may be in two parts
_MOST_SECONDS = 3  # second parts, one after the other, that are worth it

#: Chunks of a span at most, for tests.
max_span: int | None = None
#: How forwards are divided, for tests and measurements.
force: 'Shape | None' = None


class Shape(NamedTuple):
    """How a block of the forward is made up: ``parts`` warps to 16 channels, ``slices`` times as
    many to a head, ``heads`` heads; ``stages`` chunks in shared memory."""
    parts: int
    slices: int
    heads: int
    stages: int

    @property
    def width(self) -> int:
        return _BLOCK * self.slices

    @property
    def threads(self) -> int:
        return 32 * self.parts * self.slices * self.heads

    def shared(self, size: int, states: int) -> int:
        """Bytes of shared memory, for elements of so many bytes; as ForwardShared."""
        stage = self.heads * _tile(self.width, size) + 2 * _tile(states, size)
        of_head = _tile(CHUNK, size) + 2 * _DECAYS
        if self.parts > 1:
            of_head += self.width * (states * size + 16)
        return self.stages * stage + self.heads * of_head + 16


_DECAYS = 4 * (7 * CHUNK + 24)  # bytes of Decays
# Bytes of GroupsShared and of StatesGroupsShared, with tiles of 64 x 64.
_BACKWARD_GROUPS_SHARED = 17 * 8192 + 2 * (_DECAYS + 4 * (17 * CHUNK + 20))
_STATES_GROUPS_SHARED = 6 * 8192 + 2 * _DECAYS


def _tile(columns: int, size: int) -> int:
    """Bytes of a tile with a row for each token."""
    return CHUNK * (columns * size + 16)


def padded_states(state: int) -> int:
    """N of the kernels for so many states."""
    return next(n for n in STATES if n >= state)


# --- what is compiled -------------------------------------------------------------------------

def _flag(value: bool) -> str:
    return str(value).lower()


def forward_instance(type_: str, fast: bool, shape: Shape, states: int) -> Instance:
    return Instance('ssd/ssd_fwd.cu',
                    f'ssd_fwd<{type_}, {_flag(fast)}, {shape.parts}, {shape.slices}, {states}, '
                    f'{shape.heads}, {shape.stages}>')


class StatesShape(NamedTuple):
    """How a block of ssd_states is made up, as :class:`Shape`, with so many of the N states."""
    slices: int
    stages: int
    states: int

    @property
    def width(self) -> int:
        return _BLOCK * self.slices

    def shared(self, size: int) -> int:
        """Bytes of shared memory; as StatesShared."""
        return self.stages * (_tile(self.width, size) + _tile(self.states, size)) + 2 * _DECAYS


def states_instance(type_: str, fast: bool, shape: StatesShape) -> Instance:
    return Instance('ssd/ssd_states.cu',
                    f'ssd_states<{type_}, {_flag(fast)}, {shape.slices}, {shape.states}, '
                    f'{shape.stages}>')


def combine_instance() -> Instance:
    return Instance('ssd/ssd_combine.cu', 'ssd_combine')


def backward_instance(type_: str, fast: bool, channels: int, states: int) -> Instance:
    return Instance('ssd/ssd_bwd.cu', f'ssd_bwd<{type_}, {_flag(fast)}, {channels}, {states}>')


def groups_instance(what: str) -> Instance:
    """For ``'states'`` or ``'bwd'``."""
    return Instance(f'ssd/ssd_{what}_groups.cu', f'ssd_{what}_groups', only=90)


def has_groups(index: int, dtype: torch.dtype, sizes: 'Sizes') -> bool:
    """Whether there are kernels by groups of warps."""
    return (has_groups_of_warps(index)
            and (dtype, padded_channels(sizes.dim), sizes.states) == (torch.bfloat16, 64, 128))


def backward_warps(states: int) -> int:
    """WARPS of BackwardShared."""
    return max(states // _BLOCK, 4)


def backward_shared(size: int, channels: int, states: int) -> int:
    """Bytes of shared memory; as BackwardShared."""
    slices, warps = states // _BLOCK, backward_warps(states)
    tiles = (2 * (_tile(states, size) + _tile(channels, size) + channels * (states * size + 16))
             + _tile(CHUNK, size) * (CHUNK + _BLOCK) // CHUNK)
    kept = -(-_PAIRS // warps) if states in (32, 64) else 1  # KEPT
    pairs = 1024 * max(_PAIRS - kept * warps, 1)
    sums = 4 * (CHUNK * (2 * 4 + 2 + 2 * slices) + 2 * 16 + 2 * warps)
    return tiles + pairs + _DECAYS + -(-sums // 16) * 16


class BackwardShape(NamedTuple):
    """A block of the backward's kernel: ``threads``, bytes of ``shared`` memory; and how many
    ``blocks`` a multiprocessor has at a time."""
    instance: Instance
    threads: int
    shared: int
    blocks: int


@cached
def backward_shape(index: int, dtype: torch.dtype, fast: bool, sizes: 'Sizes') -> BackwardShape:
    if has_groups(index, dtype, sizes):
        return BackwardShape(groups_instance('bwd'), 384, _BACKWARD_GROUPS_SHARED, 1)
    size, channels, states = dtype.itemsize, padded_channels(sizes.dim), sizes.states
    shared = backward_shared(size, channels, states)
    # By registers, as its launch bounds say, and by shared memory.
    registers = 5 if states <= 16 else 3 if states <= 64 else 2 if states <= 128 and size < 4 else 1
    fit = device_limits(index)[1] // (shared + 1024)
    return BackwardShape(backward_instance(TYPES[dtype], fast, channels, states),
                         32 * backward_warps(states), shared, max(min(registers, fit), 1))


#: Type, channels, N: those that published models use, and one for each kind beside them; and the
#: lowest compute capability. That of matrix instructions 16 elements deep is 8.0.
_COMPILED = [('BFloat', 64, 64, 80), ('Half', 32, 16, 80), ('Float', 16, 32, 80),
             # The backward of these needs more shared memory than sm_86 and sm_89 have.
             ('BFloat', 64, 128, 90), ('Half', 64, 256, 90)]


def _compiled() -> Iterator[tuple[Instance, int]]:
    for type_, channels, states, low in _COMPILED:
        slices, parts = channels // _BLOCK, 2 if states >= 32 else 1
        yield forward_instance(type_, False, Shape(parts, slices, 1, 1), states), 80
        if states == 64:
            yield forward_instance(type_, False, Shape(2, slices, 1, 2), states), 80
            yield forward_instance(type_, False, Shape(1, slices, 1, 1), states), 80
        if 64 <= states <= 128:
            yield forward_instance(type_, False, Shape(1, slices, 3, 2), states), 90
        yield states_instance(type_, False, StatesShape(slices, 2, min(states, 64))), 80
        yield backward_instance(type_, False, channels, states), low
    yield forward_instance('Float', True, Shape(2, 4, 1, 1), 64), 80
    yield forward_instance('Half', False, Shape(1, 2, 2, 2), 16), 80
    yield combine_instance(), 80
    yield groups_instance('states'), 90
    yield groups_instance('bwd'), 90


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = dict(_compiled())


# --- sizes ------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    batch: int
    length: int
    heads: int
    dim: int
    groups: int
    state: int

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def states(self) -> int:
        """N of the kernels."""
        return padded_states(self.state)


class Strides(NamedTuple):
    """Of a map (B, L, H, ...), in elements."""
    b: int
    l: int  # noqa: E741
    h: int


class Options(NamedTuple):
    """What a call says beside its tensors. Types are those of parameters, None for absent ones."""
    dt: torch.dtype
    A: torch.dtype
    D: torch.dtype | None
    D_full: bool
    bias: torch.dtype | None
    softplus: bool
    low: float
    high: float
    reverse: bool

    def fields(self) -> dict[str, int | float]:
        return dict(step_A_type=CODES[self.A], step_bias_type=CODES.get(self.bias, 0),
                    step_dt_type=CODES[self.dt], step_softplus=int(self.softplus),
                    step_low=self.low, step_high=self.high)


def map_fields(**strides: Strides) -> dict[str, int]:
    return {f'{name}_{side}': value for name, of in strides.items()
            for side, value in of._asdict().items()}


# --- plans ------------------------------------------------------------------------------------

def forward_shape(index: int, size: int, sizes: Sizes) -> Shape:
    """How the forward is divided, by what was fastest of all ways on an H200 with maps like those
    of vision models and of Mamba-2."""
    if force is not None:
        return force
    multiprocessors, _, most_shared = device_limits(index)
    shape = _alone(size, sizes.dim, sizes.state, most_shared)
    sequences = sizes.batch * sizes.heads * -(-sizes.dim // shape.width)
    if sizes.states == 128 and sequences >= 4 * multiprocessors:
        three = shape._replace(parts=1, heads=3, stages=2)
        if (sizes.heads // sizes.groups >= three.heads and three.threads <= 384 and size < 4
                and sizes.dim <= three.width and three.shared(size, 128) <= most_shared):
            return three
    if sizes.states > 64 or size == 4 and shape.slices > 2:  # more in shared memory: fewer blocks
        return shape
    if sequences >= 4 * multiprocessors and sizes.dim <= shape.width:
        # Heads share B, C and their product. That of 16 states is cheap, and two heads do.
        most = 4 if sizes.states > 16 and size < 4 else 2
        shared = [together for heads in range(1, most + 1)
                  if sizes.heads // sizes.groups % heads == 0
                  and (together := shape._replace(parts=1, heads=heads, stages=2)).threads <= 512
                  and together.shared(size, sizes.states) <= most_shared]
        # How many a multiprocessor has one after the other, if it has one block at a time.
        turns = {of: -(-sequences // of.heads // multiprocessors) * of.heads for of in shared}
        best = min(shared, key=lambda of: (turns[of], -of.heads), default=shape)
        if best.heads > 1:
            return best
    if size == 4:
        return shape
    # A block of few goes as fast as one chunk after the other does, so it has more warps and reads
    # ahead; of many, small ones keep a multiprocessor busier.
    if sequences * span_of(index, sizes, sequences)[1] > 2 * multiprocessors:
        return shape._replace(parts=1)
    ahead = shape._replace(stages=2)
    return ahead if ahead.shared(size, sizes.states) <= most_shared else shape


def _alone(size: int, dim: int, state: int, most_shared: int) -> Shape:
    """For one head: as many of its channels as fit. Many states have two warps for 16 channels."""
    states = padded_states(state)
    shape = Shape(2 if states >= 32 else 1, padded_channels(dim) // _BLOCK, 1, 1)
    while shape.slices > 1 and shape.shared(size, states) > most_shared:
        shape = shape._replace(slices=shape.slices // 2)
    return shape


def padded_channels(dim: int) -> int:
    """P of the backward's kernel for so many channels."""
    return next(n for n in (16, 32, 64, 128) if n >= dim)


def states_shape(index: int, size: int, sizes: Sizes) -> StatesShape:
    shape = StatesShape(padded_channels(sizes.dim) // _BLOCK, 2, min(sizes.states, 64))
    if shape.shared(size) > device_limits(index)[2]:
        shape = shape._replace(stages=1)
    return shape


def least_shared(size: int, dim: int, state: int, training: bool) -> int:
    """Bytes of shared memory that the kernels need, for elements of so many bytes."""
    states = padded_states(state)
    return max(Shape(1, 1, 1, 1).shared(size, states),
               backward_shared(size, padded_channels(dim), states) if training else 0)


def span_of(index: int, sizes: Sizes, sequences: int) -> tuple[int, int]:
    """(chunks of a span, spans) for so many ``sequences``, of which a block has one. They are
    divided if they are fewer than multiprocessors, and into spans of at least 4 chunks."""
    multiprocessors, chunks = device_limits(index)[0], sizes.chunks
    if max_span:
        span = max_span
    elif sequences >= multiprocessors:
        span = chunks
    else:
        span = max(-(-chunks // (3 * multiprocessors // sequences)), min(4, chunks))
    return span, -(-chunks // span)


class Cut(NamedTuple):
    """So many sequences are in two parts, of which the first one has ``first`` chunks."""
    sequences: int
    first: int


def cut_of(blocks: int, slots: int, chunks: int) -> Cut:
    """For ``blocks``, each with a sequence of so many chunks, on ``slots`` with a block at a time.

    What remains after full turns is divided: slots have first parts and whole sequences, and those
    that had no first part have second ones at the end.
    """
    left = blocks % slots
    if blocks < slots or left == 0 or chunks < _LEAST_CUT:
        return Cut(0, 0)
    seconds = -(-left // (slots - left))  # of a slot
    if seconds > _MOST_SECONDS:
        return Cut(0, 0)
    return Cut(left, -(-seconds * chunks // (seconds + 1)))


# --- launches ---------------------------------------------------------------------------------

class Launch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs, the first ``zeros`` of them zero."""
    run: Callable[..., None]
    memory: int
    zeros: int = 0


class States:
    """Launches of ssd_states and ssd_combine: ``span`` chunks of a span, ``spans`` of them."""

    def __init__(self, index: int, dtype: torch.dtype, fast: bool, sizes: Sizes, options: Options,
                 maps: dict[str, Strides], span: int, spans: int):
        self.sizes, self.spans = sizes, spans
        self.shape = states_shape(index, dtype.itemsize, sizes)
        self._instance = states_instance(TYPES[dtype], fast, self.shape)
        self._shared = self.shape.shared(dtype.itemsize)
        if has_groups(index, dtype, sizes):
            self.shape = StatesShape(4, 2, 128)
            self._instance, self._shared = groups_instance('states'), _STATES_GROUPS_SHARED
        self._index = index
        zero = Strides(0, 0, 0)
        self._fields = dict(
            length=sizes.length, heads=sizes.heads, per_group=sizes.heads // sizes.groups,
            dim=sizes.dim, state=sizes.state, columns=-(-sizes.dim // self.shape.width),
            parts=-(-sizes.state // self.shape.states), chunks=sizes.chunks, span=span,
            spans=spans, reverse=int(options.reverse),
            **options.fields(), **map_fields(**dict.fromkeys(('x', 'dy', 'dt', 'B', 'C'), zero)
                                              | maps))

    @property
    def entries(self) -> int:
        """Numbers of the states of all spans."""
        sizes = self.sizes
        return sizes.batch * sizes.heads * self.spans * sizes.dim * sizes.state

    @property
    def sums(self) -> int:
        return self.sizes.batch * self.sizes.heads * self.spans

    def bind(self, jobs: int, backwards: int = 0) -> Callable[..., None]:
        """The states, the gradients (``backwards``), or both."""
        sizes = self.sizes
        blocks = sizes.batch * sizes.heads * self._fields['columns'] * self._fields['parts']
        return load(self._instance, self._index).bind(
            (blocks, self.spans, jobs), (32 * self.shape.slices, 1, 1), self._shared,
            backwards=backwards, **self._fields)

    def combine(self, jobs: int) -> Callable[..., None]:
        sizes = self.sizes
        count, size = sizes.batch * sizes.heads, sizes.dim * sizes.state
        return kernel(self._index, combine_instance).bind(
            (-(-count * size // 512), jobs, 1), (128, 1, 1), count=count, spans=self.spans,
            size=size, backwards=0)


@cached
def forward_launch(index: int, dtype: torch.dtype, fast: bool, sizes: Sizes, options: Options,
                   x: Strides, z: Strides, y: Strides, dt: Strides, B: Strides, C: Strides
                   ) -> Launch:
    """The forward.

    It takes the addresses of x, dt, A, B, C, y and memory, and, 0 for none, of D, bias, z, start
    and last (the initial and the final state, (B, H, P, N), fp32), and seq_idx (B, L), int32.
    """
    shape = forward_shape(index, dtype.itemsize, sizes)
    multiprocessors, all_shared, _ = device_limits(index)
    columns, shared = -(-sizes.dim // shape.width), shape.shared(dtype.itemsize, sizes.states)
    of_group = -(-(sizes.heads // sizes.groups) // shape.heads)
    sequences = sizes.batch * sizes.groups * of_group * columns
    span, spans = span_of(index, sizes, sequences)
    alone = shape.parts == 1 and spans == 1 and 2 * (shared + 1024) > all_shared
    cut = cut_of(sequences, multiprocessors, span) if alone else Cut(0, 0)
    run = kernel(index, forward_instance, TYPES[dtype], fast, shape, sizes.states).bind(
        (sequences + cut.sequences, spans, 1), (shape.threads, 1, 1), shared,
        length=sizes.length, heads=sizes.heads, per_group=sizes.heads // sizes.groups,
        teams=sizes.groups * of_group, of_group=of_group, dim=sizes.dim, state=sizes.state,
        columns=columns, span=span, spans=spans, sequences=sequences, cuts=cut.sequences,
        first=cut.first, reverse=int(options.reverse), D_type=CODES.get(options.D, 0),
        D_full=int(options.D_full), **options.fields(),
        **map_fields(x=x, z=z, y=y, dt=dt, B=B, C=C))
    slab = Slab()
    slab.take(cut.sequences and cut.sequences + 1)  # flags, and how many blocks have begun
    zeros = slab.size
    halves_at = slab.take(cut.sequences * shape.heads * sizes.dim * sizes.state)
    if spans == 1:
        def launch_forward(x, dt, A, B, C, y, memory, D=0, bias=0, z=0, start=0, last=0, seq_idx=0):
            run(x_data=x, dt_data=dt, step_A=A, B_data=B, C_data=C, y_data=y, D=D, step_bias=bias,
                z_data=z, entries=start, last=last, step_index=seq_idx, ready=memory,
                tickets=memory + 4 * cut.sequences, halves=memory + halves_at)

        return Launch(launch_forward, slab.size, zeros)

    states = States(index, dtype, fast, sizes, options, dict(x=x, dt=dt, B=B), span, spans)
    ends_at, entries_at = slab.take(states.entries), slab.take(states.entries)
    sums_at = slab.take(states.sums)
    summarise, combine = states.bind(1), states.combine(1)

    def launch_in_spans(x, dt, A, B, C, y, memory, D=0, bias=0, z=0, start=0, last=0,
                           seq_idx=0):
        ends, entries, sums = memory + ends_at, memory + entries_at, memory + sums_at
        summarise(x_data=x, dt_data=dt, step_A=A, step_bias=bias, step_index=seq_idx, B_data=B,
                  ends=ends, sums=sums)
        combine(ends=ends, sums=sums, before=start, entries=entries)
        run(x_data=x, dt_data=dt, step_A=A, B_data=B, C_data=C, y_data=y, D=D, step_bias=bias,
            z_data=z, entries=entries, last=last, step_index=seq_idx, ready=0, tickets=0, halves=0)

    return Launch(launch_in_spans, slab.size)
