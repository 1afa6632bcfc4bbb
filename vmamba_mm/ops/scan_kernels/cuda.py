"""Launches of the CUDA kernels that ss2d_scan and selective_scan share, for any number of states.

A scan is a route of ss2d_scan over one image, or a sequence of selective_scan, with 1, 4 or 16
states: more are several scans. ``kernels/README.md`` says how the kernels work. fp16 and fp32 need
sm_75, bf16 sm_80.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
    pointer,
)

SAVED = 24  # positions between saved states, as in scan.cuh
# Warps of a block at most, as in the launch bounds, and of a multiprocessor, by registers
_FORWARD_WARPS, _FORWARD_RESIDENT = 6, 24
_LEAST_SPAN = 8  # chunks
# What enters a span costs so much of a chunk of the forward, and of the backward, on an H200
_ENTRIES_OF_FORWARD, _ENTRIES_OF_BACKWARD = 0.85, 1.15
RUN, ENDS, GRADIENTS = range(3)  # modes of the forward kernel, as in scan_fwd.cu


# --- what is compiled -------------------------------------------------------------------------

def prepare_instance() -> Instance:
    return Instance('scan/scan_prepare.cu', 'scan_prepare')


def combine_instance() -> Instance:
    return Instance('scan/scan_combine.cu', 'scan_combine<8>')


def finish_instance() -> Instance:
    return Instance('scan/scan_finish.cu', 'scan_finish')


def _defines(ordered: bool) -> tuple[tuple[str, int], ...]:
    return (('ORDERED', 1),) if ordered else ()


def forward_instance(type_: str, states: int, sequence: bool, ordered: bool, mode: int
                     ) -> Instance:
    """``states`` of a scan: 1, 4 or 16; ``ordered``: along tables of positions; ``mode`` is RUN,
    ENDS or GRADIENTS."""
    return Instance('scan/scan_fwd.cu', f'scan_fwd<{type_}, {states}, {str(sequence).lower()}, '
                    f'{mode}>', defines=_defines(ordered))


def backward_instance(type_: str, states: int, sequence: bool, ordered: bool) -> Instance:
    return Instance('scan/scan_bwd.cu', f'scan_bwd<{type_}, {states}, {str(sequence).lower()}>',
                    defines=_defines(ordered))


# Type, states of a scan, whether of selective_scan, whether along tables of positions. The types
# that people use, and for each number of states and each kind of sequence one that is compiled:
# half maps with N = 1 have kernels of their own, in ss2d_scan, but for tables.
_COMPILED = [('Half', 16, False, False), ('BFloat', 16, False, False), ('Float', 1, False, False),
             ('Float', 16, False, False), ('Half', 1, True, False), ('Float', 16, True, False),
             ('Half', 16, False, True), ('BFloat', 16, False, True), ('Float', 16, False, True),
             ('Half', 1, False, True)]

#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **{instance: 80 if type_ == 'BFloat' else 75 for type_, states, *kind in _COMPILED
       for instance in (forward_instance(type_, states, *kind, RUN),
                        backward_instance(type_, states, *kind))},
    **{forward_instance('Half', 16, False, ordered, mode): 75
       for mode in (ENDS, GRADIENTS) for ordered in (False, True)},
    prepare_instance(): 75,
    finish_instance(): 75,
    combine_instance(): 75,
}


# --- what the kernels take --------------------------------------------------------------------

def why_not(tensor: Tensor, rank: int, state: int) -> str | None:
    """The reason why the kernels cannot take a map or sequence like ``tensor``, or None."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return f'the input is on {tensor.device}, not on an NVIDIA GPU'
    if tensor.dtype not in TYPES:
        return f'the input is {tensor.dtype}; the kernels take float16, bfloat16 and float32'
    if tensor.shape[0] == 0 or tensor.numel() // tensor.shape[0] >= 2**31:
        return 'a sample has 2^31 elements or more, or the batch is empty'
    return why_not_here(tensor.device.index, tensor.dtype, rank, state)


@torch.compiler.assume_constant_result
def why_not_here(index: int, dtype: torch.dtype, rank: int, state: int) -> str | None:
    """The reason why the GPU ``index`` cannot run the kernels on such maps, or None."""
    return _why_not_on(index, dtype, rank, state)


@cached
def _why_not_on(index: int, dtype: torch.dtype, rank: int, state: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < ((8, 0) if dtype == torch.bfloat16 else (7, 5)):
        return f'a GPU of compute capability {capability} is too old for {dtype}'
    shared = _backward_shared(rank, groups_of(state)[0], 1, 2)
    if shared > device_limits(index)[2]:
        return f'dt_rank={rank} needs {shared} bytes of shared memory, more than this GPU has'
    return None


def groups_of(state: int) -> tuple[int, int]:
    """(states of a scan, scans that share the N states of a channel)."""
    states = 1 if state == 1 else 4 if state <= 4 else 16
    return states, -(-state // states)


def states_shape(batch: int, routes: int, length: int, state: int, dim: int) -> tuple[int, ...]:
    """The shape of what the forward saves: (B, K, chunks, N, D) for N of 1, 4 and 16; else the
    states are divided among several scans."""
    states, groups = groups_of(state)
    return batch, routes * groups, -(-length // SAVED), states, dim


def maps_dtype(dtype: torch.dtype, state: int) -> torch.dtype:
    """The dtype of the result of each scan: fp32 where several are added for one of ``dtype``."""
    return dtype if groups_of(state)[1] == 1 else torch.float32


def _backward_width(states: int) -> int:
    """The number of channels of a warp of the backward."""
    return 16 if states == 16 else 32


def _backward_shared(rank: int, states: int, warps: int, words: int) -> int:
    """Bytes of shared memory of a block of the backward, with so many ``words`` of 4 bytes for each
    position beside what all need, 0 to 2."""
    width, pitch = _backward_width(states), SAVED + 4
    per_warp = (width * pitch + max(3 * width * pitch, 2 * rank * SAVED)
                + SAVED // 4 * width * states + 32 * (-(-rank // 8) * 8 + 6)
                + words * width * SAVED)
    teams = -(-warps // 4)
    columns = (rank + 2 * states) * (teams * pitch + (teams - 1) * SAVED)
    return 4 * (64 + columns + rank * warps * width + warps * per_warp)


def _forward_shared(rank: int, states: int, warps: int, mode: int) -> int:
    """Bytes of shared memory of a block of the forward."""
    staged = (rank + states * (2 if mode == RUN else 1)) * (2 * SAVED + 4)
    return 4 * (staged + 32 * warps * (rank + 7 + (states | 1)))


def magic(divisor: int) -> int:
    """2^32 / divisor, rounded up; 0 for 1."""
    return 0 if divisor == 1 else -(-2**32 // divisor)


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` without gaps and at a multiple of 16 bytes, as kernels take it; a copy if need
    be."""
    if tensor is None or tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Schedule(NamedTuple):
    """The grid of a launch: warps of a block, blocks side by side in channels, positions of a span,
    spans of a scan."""
    warps: int
    columns: int
    span: int
    spans: int


class _Divided(NamedTuple):
    """How the channels of scans are divided: warps of a block, blocks side by side, all blocks of
    undivided scans, and how many the GPU has at a time."""
    warps: int
    columns: int
    blocks: int
    slots: int


class PreparedOffsets(NamedTuple):
    """Bytes: where each part of what :func:`prepare_launch` writes begins, and the size of all."""
    weights: int
    bias: int
    rates: int
    skip: int
    size: int


def _prepared_offsets(sizes: tuple[int, ...], state: int) -> PreparedOffsets:
    plain = sizes[1] * sizes[5]
    states, groups = groups_of(state)
    weights, rates = plain * sizes[4], plain * groups * states
    return PreparedOffsets(0, 4 * (weights + rates), 4 * weights, 4 * (weights + rates + plain),
                           4 * (weights + rates + 2 * plain))


def prepared_size(sizes: tuple[int, ...], state: int) -> int:
    """Elements, fp32, of what :func:`prepare_launch` writes."""
    return _prepared_offsets(sizes, state).size // 4


def plain_strides(sizes: tuple[int, ...], sequence: bool) -> tuple[int, ...]:
    """The strides of a map (B, D, H, W) with the channels last, or of a sequence, without gaps."""
    _, dim, height, width, _, routes = sizes
    if sequence:
        return routes * dim * width, width, width, 1
    return height * width * dim, 1, width * dim, dim


class Scans:
    """The state that the launches for such sizes share: see :func:`forward_launch`."""

    max_span = None  # for tests, which then ``forget``: positions of a span at most

    def __init__(self, index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                 sequence: bool, softplus: bool, ordered: bool = False):
        self.index, self.sequence, self.softplus = index, sequence, softplus
        self.ordered = ordered
        self.type, self.sizes, self.state = TYPES[dtype], sizes, state
        batch, self.dim, height, width, self.rank, self.routes = sizes
        self.length = height * width
        self.states, self.groups = groups_of(state)
        self.chunks = -(-self.length // SAVED)
        self.count = batch * self.routes * self.groups
        self.prepared = _prepared_offsets(sizes, state)
        # Whether what a thread takes at a time may be one aligned vector.
        self.vectors = sequence and self.length % 8 == 0

    def _divide(self, width: int, warps_of_block: int, warps_at_once: int,
                shared: Callable[[int], int]) -> _Divided:
        """
        Args:
            width: channels of a warp.
            warps_of_block, warps_at_once: of a block and of a multiprocessor at most.
            shared: bytes of a block by its warps.
        """
        multiprocessors, of_all, of_block = device_limits(self.index)

        def resident(n: int) -> int:
            return min(of_all // (shared(n) + 1024), warps_at_once // n) * n

        needed = -(-self.dim // width)
        fitting = [n for n in range(1, min(warps_of_block, needed) + 1) if shared(n) <= of_block]
        best = max(fitting, key=lambda n: (resident(n), n))
        columns = -(-needed // best)
        warps = -(-needed // columns)
        return _Divided(warps, columns, self.count * columns,
                        multiprocessors * max(1, resident(warps) // warps))

    def _schedule(self, divided: _Divided, entries: _Divided, weight: float) -> Schedule:
        """One in which the GPU has enough to do: few scans are divided into spans, what enters them
        is found by launches with ``entries``, and a chunk of these takes ``weight`` of one."""
        def chunks_of_slot(spans: int) -> float:  # one after the other; a block has a start too
            span, start = -(-self.chunks // spans), 1
            found = weight * max(0.5, entries.blocks * (spans - 1) / entries.slots) * span
            return -(-divided.blocks * spans // divided.slots) * (span + start) + (
                found if spans > 1 else 0)

        most = min(-(-self.chunks // _LEAST_SPAN), max(1, 16 * divided.slots // divided.blocks))
        spans = min(range(1, most + 1), key=chunks_of_slot)
        if self.max_span:
            spans = max(spans, -(-self.length // self.max_span))
        span = -(-self.chunks // spans)
        return Schedule(divided.warps, divided.columns, span * SAVED, -(-self.chunks // span))

    def _divide_forward(self) -> _Divided:
        return self._divide(32, _FORWARD_WARPS, _FORWARD_RESIDENT,
                            lambda n: _forward_shared(self.rank, self.states, n, RUN))

    def forward_schedule(self) -> Schedule:
        divided = self._divide_forward()
        return self._schedule(divided, divided, _ENTRIES_OF_FORWARD)

    def backward_schedule(self) -> tuple[Schedule, int]:
        """The schedule, and bytes of shared memory of a block."""
        words = 1 if self.type != 'Float' else 2 * self.sequence

        def shared(warps: int) -> int:
            return _backward_shared(self.rank, self.states, warps, words)

        # As in the launch bounds; memory for 12 alone, which sm_110 has too, is not enough.
        warps = 12 if torch.cuda.get_device_capability(self.index)[0] in (9, 10) else 8
        divided = self._divide(_backward_width(self.states), warps, warps, shared)
        schedule = self._schedule(divided, self._divide_forward(), _ENTRIES_OF_BACKWARD)
        return schedule, shared(schedule.warps)

    def bind(self, schedule: Schedule, shared: int, strides: tuple[int, ...], y_dtype: torch.dtype,
             part_dtype: torch.dtype, instance: Callable[..., Instance], *args
             ) -> Callable[..., None]:
        """A launch of the fields of ScanParams in scan.cuh; ``vector`` is given in each call.

        ``strides`` are those of x and of grad, B, D, H, W each.
        """
        batch, dim, height, width, rank, routes = self.sizes
        names = [f'{tensor}_{side}' for tensor in ('x', 'grad') for side in 'bdhw']
        return kernel(self.index, instance, self.type, self.states, self.sequence, self.ordered,
                      *args).bind(
            (self.count * schedule.spans * schedule.columns, 1, 1), (32 * schedule.warps, 1, 1),
            shared, ('vector',), **dict(zip(names, strides, strict=True)), batch=batch, dim=dim,
            height=height, width=width, rank=rank, state=self.state, routes=routes,
            groups=self.groups, span=schedule.span, spans=schedule.spans, chunks=self.chunks,
            columns=schedule.columns, softplus=int(self.softplus), y_type=CODES[y_dtype],
            part_type=CODES[part_dtype], magic_height=magic(height), magic_width=magic(width))

    def bind_entries(self, schedule: Schedule, mode: int, strides: tuple[int, ...],
                     dtype: torch.dtype) -> tuple[int, Callable[..., int]]:
        """Bytes of memory, and what finds there what enters each span and gives its address:
        ENDS of spans of the forward, or GRADIENTS of the backward, by ``grad``; of all but the
        span from which nothing enters another."""
        if schedule.spans == 1:
            return 0, lambda *addresses, **named: 0
        warps, columns = self.forward_schedule()[:2]
        inner, at, vectors = self.states * self.dim, self.prepared, self.vectors
        size = 4 * self.count * schedule.spans * inner
        summarise = self.bind(
            schedule._replace(warps=warps, columns=columns, spans=schedule.spans - 1),
            _forward_shared(self.rank, self.states, warps, mode), strides, dtype, dtype,
            forward_instance, mode)
        combine = kernel(self.index, combine_instance).bind(
            (-(-self.count * inner // 128), 1, 1), (128, 1, 1), scans=self.count,
            spans=schedule.spans, dim=inner, back=0, sources=schedule.spans - 1)

        def launch_entries(x, raw, prepared, B, C, memory, grad=0, orders=0):
            ends, entries = memory + size, memory + 2 * size
            summarise(x=x, raw=raw, B=B, C=C, weights=prepared, bias=prepared + at.bias,
                      rates=prepared + at.rates, skip=prepared + at.skip, decays=memory, ends=ends,
                      grad=grad, orders=orders, vector=int(vectors and (x | raw | grad) % 16 == 0))
            combine(decays=memory, ends=ends, entries=entries)
            return entries

        return 3 * size, launch_entries


# --- launches, of addresses -----------------------------------------------------------------------
# For sizes (batch, dim, height, width, rank, routes); of selective_scan dim is that of a group,
# height 1 and rank 0.

@cached
def prepare_launch(index: int, sizes: tuple[int, ...], state: int,
                   dtypes: tuple[torch.dtype | None, ...], logs: bool, merged: bool = True
                   ) -> tuple[int, Callable[..., None]]:
    """Elements, fp32, of ``prepared``, which the others take, and what writes it.

    It takes the addresses of dt_projs_weight (K, D, R), dt_projs_bias (K, D), A (K * D, N) or with
    ``logs`` log(-A), D (K * D), each of its dtype (0 and None for one that there is not), and
    ``prepared``. ``merged``: the results of the routes are added up.
    """
    at = _prepared_offsets(sizes, state)
    states, groups = groups_of(state)
    dt_type, bias_type, A_type, D_type = (CODES.get(d, 0) for d in dtypes)
    launch = kernel(index, prepare_instance).bind(
        (min(1024, -(-at.size // 1024)), 1, 1), (256, 1, 1), dim=sizes[1], rank=sizes[4],
        state=state, padded=groups * states, routes=sizes[5], merged=int(merged), dt_type=dt_type,
        bias_type=bias_type, A_type=A_type, D_type=D_type, logs=int(logs))

    def launch_prepare(dt_weight, dt_bias, A, D, prepared):
        launch(dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D, weights=prepared,
               bias=prepared + at.bias, rates=prepared + at.rates, skip=prepared + at.skip)

    return at.size // 4, launch_prepare


class Launch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs; of a backward the parts that are to be
    summed, of ``dprojected`` (of the gradients by B and C, of selective_scan) and of ``sums``."""
    run: Callable[..., None]
    memory: int
    columns: int = 1
    parts: int = 1


@cached
def forward_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                   strides: tuple[int, ...] | None = None, *, sequence: bool = False,
                   softplus: bool = True, written: torch.dtype | None = None,
                   ordered: bool = False) -> Launch:
    """The forward, for x (B, D, H, W) of ``dtype``, and of ``strides`` unless it is channels-last
    without gaps.

    It takes the addresses of x, projected (B * L, K * (R + 2 N)) of ``dtype``, prepared, maps (G,
    K, B, H, W, D) and states (:func:`states_shape`, fp32), each written where it is not 0, and
    memory. G and the maps' dtype: :func:`groups_of`, :func:`maps_dtype` of ``written`` or else
    ``dtype``.

    With ``sequence``: u, delta (B, K * D, L), prepared, y (G, B, K * D, L), states, memory, B and
    C (B, K, N, L). With ``ordered`` it takes the address of ``orders`` besides, (K, L) int32: the
    pixel that each step of a route visits; the strides are then those of samples, channels, 0 and
    pixels.
    """
    scans = Scans(index, dtype, sizes, state, sequence, softplus, ordered)
    plain, schedule = plain_strides(sizes, sequence), scans.forward_schedule()
    strides, at, vectors = (*(strides or plain), *plain), scans.prepared, scans.vectors
    shared = _forward_shared(scans.rank, scans.states, schedule.warps, RUN)
    scan = scans.bind(schedule, shared, strides, maps_dtype(written or dtype, state), dtype,
                      forward_instance, RUN)
    memory_size, launch_entries = scans.bind_entries(schedule, ENDS, strides, dtype)

    def launch_forward(x, projected, prepared, maps, states, memory, B=0, C=0, orders=0):
        entries = launch_entries(x, projected, prepared, B, C, memory, orders=orders)
        scan(x=x, raw=projected, B=B, C=C, weights=prepared, bias=prepared + at.bias,
             rates=prepared + at.rates, skip=prepared + at.skip, entries=entries, states=states,
             y=maps, orders=orders, vector=int(vectors and (x | projected | maps) % 16 == 0))

    return Launch(launch_forward, memory_size)


@cached
def backward_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                    strides: tuple[int, ...] | None = None,
                    grad_strides: tuple[int, ...] | None = None, *, sequence: bool = False,
                    softplus: bool = True, ordered: bool = False) -> Launch:
    """The backward of :func:`forward_launch`.

    It takes the addresses of x, projected, prepared, states, grad (of ``dtype``, by the sum of the
    maps), maps (by x, as in the forward), dprojected (columns, like projected), sums (parts, K, G,
    states + R + 2, D, fp32: of A, dt_projs_weight, dt_projs_bias and D), and memory. dprojected has
    ``dtype`` where there is one column, else fp32; with G > 1 it is to be zero before.

    With ``sequence`` dprojected is by delta, like y, and after memory come B, C, and the gradients
    by them (columns, B, K, N, L). ``ordered``: as there.
    """
    scans = Scans(index, dtype, sizes, state, sequence, softplus, ordered)
    plain = plain_strides(sizes, sequence)
    strides, at = (*(strides or plain), *(grad_strides or plain)), scans.prepared
    schedule, shared = scans.backward_schedule()
    columns = schedule.columns if sequence else schedule.columns * scans.groups
    scan = scans.bind(schedule, shared, strides, maps_dtype(dtype, state),
                      dtype if columns == 1 else torch.float32, backward_instance)
    memory_size, launch_entries = scans.bind_entries(schedule, GRADIENTS, strides, dtype)
    vectors = scans.vectors

    def launch_backward(x, projected, prepared, states, grad, maps, dprojected, sums, memory, B=0,
                        C=0, grad_B=0, grad_C=0, orders=0):
        entries = launch_entries(x, projected, prepared, B, C, memory, grad, orders)
        scan(x=x, raw=projected, B=B, C=C, weights=prepared, bias=prepared + at.bias,
             rates=prepared + at.rates, skip=prepared + at.skip, entries=entries, states=states,
             grad=grad, grad_x=maps, grad_raw=dprojected, grad_B=grad_B, grad_C=grad_C, sums=sums,
             orders=orders,
             vector=int(vectors and (x | projected | grad | maps | dprojected) % 16 == 0))

    return Launch(launch_backward, memory_size, columns, sizes[0] * schedule.spans)


@cached
def finish_launch(index: int, sizes: tuple[int, ...], state: int,
                  dtypes: tuple[torch.dtype | None, ...], parts: int) -> Callable[..., None]:
    """The gradients by the parameters of :func:`prepare_launch`, of these dtypes, from ``parts`` of
    ``sums``.

    It takes the addresses ``sums``, the gradients ``dt_weight``, ``dt_bias``, ``A`` and ``D`` (each
    written where it is not 0), and ``A_logs``: log(-A), by which the gradient is then, or 0.
    """
    dim, rank, routes = sizes[1], *sizes[4:]
    states, groups = groups_of(state)
    dt_type, bias_type, A_type, D_type = (CODES.get(d, 0) for d in dtypes)
    return kernel(index, finish_instance).bind(
        (-(-routes * (state + rank + 2) * dim // 32), 1, 1), (32, 8, 1), parts=parts, dim=dim,
        rank=rank, state=state, states=states, routes=routes, groups=groups, dt_type=dt_type,
        bias_type=bias_type, A_type=A_type, D_type=D_type)


# --- what both ops do with tensors ----------------------------------------------------------------

def prepare(sizes: tuple[int, ...], parameters: tuple[Tensor | None, ...], logs: bool = False,
            merged: bool = True) -> Tensor:
    """Prepare the four parameters of :func:`prepare_launch`, None for absent, for the kernels."""
    parameters = [None if t is None else t.contiguous() for t in parameters]
    A = parameters[2]
    size, launch_prepare = prepare_launch(A.get_device(), sizes, A.shape[1], _dtypes(parameters),
                                          logs, merged)
    prepared = A.new_empty(size, dtype=torch.float32)
    launch_prepare(*map(pointer, parameters), prepared.data_ptr())
    return prepared


def merge_groups(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """One result of ``dtype`` for those of the scans that share a channel's states."""
    return maps[0] if len(maps) == 1 else maps.sum(0).to(dtype)


def empty_sums(x: Tensor, sizes: tuple[int, ...], state: int, parts: int) -> Tensor:
    _, dim, _, _, rank, routes = sizes
    states, groups = groups_of(state)
    return x.new_empty((parts, routes, groups, states + rank + 2, dim), dtype=torch.float32)


def finish(sums: Tensor, sizes: tuple[int, ...], parameters: tuple[Tensor | None, ...],
           logs: bool = False) -> list[Tensor | None]:
    """The gradients by the ``parameters`` of :func:`prepare`, in their dtypes, from ``sums``."""
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
             for t in parameters]
    A = parameters[2].contiguous()
    by_weight, by_bias, by_A, by_D = map(pointer, grads)
    finish_launch(sums.get_device(), sizes, A.shape[1], _dtypes(grads), len(sums))(
        sums=sums.data_ptr(), dt_weight=by_weight, dt_bias=by_bias, A=by_A, D=by_D,
        A_logs=A.data_ptr() if logs else 0)
    return grads


def _dtypes(tensors) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)
