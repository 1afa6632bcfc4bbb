"""Launches of the CUDA "walk" kernels, which ss2d_scan and selective_scan share.

A walk is a route of ss2d_scan over an image, or a sequence of selective_scan;
``kernels/README.md`` says how they work. fp16 and fp32 need sm_75, bf16 sm_80; any number of
states, 16 to a walk: more are several walks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel

TYPES = {torch.float32: 'Float', torch.float16: 'Half', torch.bfloat16: 'BFloat'}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SAVED = 24  # positions between saved states, as in walk.cuh
# Warps of a block at most, as in the launch bounds, and of a multiprocessor, by registers
_FORWARD_WARPS, _FORWARD_RESIDENT = 6, 24
RUN, ENDS, GRADIENTS = range(3)


def prepare_instance() -> Instance:
    return Instance('walk_prepare.cu', 'walk_prepare', 'P' * 8 + 'i' * 11)


def combine_instance() -> Instance:
    return Instance('scan_combine.cu', 'scan_combine<8>', 'PPPiiii')


def finish_instance() -> Instance:
    return Instance('walk_finish.cu', 'walk_finish', 'P' * 6 + 'i' * 11)


_PARAMS = 'P' * 19 + 'q' * 8 + 'i' * 18


def forward_instance(type_: str, states: int, sequence: bool, mode: int) -> Instance:
    """``states`` of a walk: 1, 4 or 16; ``mode`` is RUN, ENDS or GRADIENTS."""
    return Instance('walk_fwd.cu', f'walk_fwd<{type_}, {states}, {str(sequence).lower()}, '
                    f'{mode}>', _PARAMS)


def backward_instance(type_: str, states: int, sequence: bool) -> Instance:
    return Instance('walk_bwd.cu', f'walk_bwd<{type_}, {states}, {str(sequence).lower()}>',
                    _PARAMS)


@cached
def device_limits(index: int) -> tuple[int, int, int]:
    """(multiprocessors, bytes of shared memory of each, of a block at most)."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.multi_processor_count, properties.shared_memory_per_multiprocessor,
            properties.shared_memory_per_block_optin)


def why_not(tensor: Tensor, rank: int, state: int) -> str | None:
    """What keeps the kernels from taking a map or sequence like ``tensor``, or None."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return f'the input is on {tensor.device}, not on an NVIDIA GPU'
    if tensor.dtype not in TYPES:
        return f'the input is {tensor.dtype}; the kernels take float16, bfloat16 and float32'
    if tensor.shape[0] == 0 or tensor.numel() // tensor.shape[0] >= 2**31:
        return 'a sample has 2^31 elements or more, or the batch is empty'
    return _why_not_here(tensor.device.index, tensor.dtype, rank, state)


@torch.compiler.assume_constant_result
def _why_not_here(index: int, dtype: torch.dtype, rank: int, state: int) -> str | None:
    """What keeps a GPU from it."""
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
    """(states of a walk, walks that share the N states of a channel)."""
    states = 1 if state == 1 else 4 if state <= 4 else 16
    return states, -(-state // states)


def states_shape(batch: int, routes: int, length: int, state: int, dim: int) -> tuple[int, ...]:
    """Of what the forward saves: (B, K, chunks, N, D) for N of 1, 4 and 16; else N is cut."""
    states, groups = groups_of(state)
    return batch, routes * groups, -(-length // _SAVED), states, dim


def maps_dtype(dtype: torch.dtype, state: int) -> torch.dtype:
    """Of the result of each walk: fp32 where several are to be added for one of ``dtype``."""
    return dtype if groups_of(state)[1] == 1 else torch.float32


def _backward_width(states: int) -> int:
    """Channels of a warp."""
    return 16 if states == 16 else 32


def _backward_shared(rank: int, states: int, warps: int, kept: int) -> int:
    """``kept``: numbers of 4 bytes that it has for each position beside what all need, 0 to 2."""
    width, pitch = _backward_width(states), _SAVED + 4
    own = (width * pitch + max(3 * width * pitch, 2 * rank * _SAVED)
           + _SAVED // 4 * width * states + 32 * (-(-rank // 8) * 8 + 6) + kept * width * _SAVED)
    teams = -(-warps // 4)
    columns = (rank + 2 * states) * (teams * pitch + (teams - 1) * _SAVED)
    return 4 * (64 + columns + rank * warps * width + warps * own)


def _forward_shared(rank: int, states: int, warps: int, mode: int) -> int:
    staged = (rank + states * (2 if mode == RUN else 1)) * (2 * _SAVED + 4)
    return 4 * (staged + 32 * warps * (rank + 7 + (states | 1)))


def magic(divisor: int) -> int:
    """2^32 / divisor, rounded up, as the int32 of the same bits; 0 for 1."""
    value = 0 if divisor == 1 else -(-2**32 // divisor)
    return value - 2**32 if value >= 2**31 else value


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` without gaps and at a multiple of 16 bytes, as kernels take it; a copy if need
    be."""
    if tensor is None or tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Cut(NamedTuple):
    """Of a launch: warps of a block, blocks side by side, positions of a span, spans."""
    warps: int
    columns: int
    span: int
    spans: int


class Walk:
    """What the launches for such sizes share: see :func:`forward_launch`."""

    max_span = None  # for tests, which then ``forget``: positions after which a walk is cut

    def __init__(self, index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                 sequence: bool, softplus: bool):
        self.index, self.sequence, self.softplus = index, sequence, softplus
        self.type, self.sizes, self.state = TYPES[dtype], sizes, state
        batch, self.dim, height, width, self.rank, self.routes = sizes
        self.length = height * width
        self.states, self.groups = groups_of(state)
        self.chunks = -(-self.length // _SAVED)
        self.walks = batch * self.routes * self.groups
        self.offsets = _prepared_offsets(sizes, state)[:4]

    def _cut(self, width: int, of_a_block: int, most: int, shared) -> Cut:
        """Few walks are cut.

        Args:
            width: channels of a warp.
            of_a_block, most: warps of a block and of a multiprocessor at most.
            shared: bytes of a block by its warps.
        """
        multiprocessors, of_all, of_block = device_limits(self.index)

        def resident(n: int) -> int:
            return min(of_all // (shared(n) + 1024), most // n) * n

        needed = -(-self.dim // width)
        fitting = [n for n in range(1, min(of_a_block, needed) + 1) if shared(n) <= of_block]
        best = max(fitting, key=lambda n: (resident(n), n))
        columns = -(-needed // best)
        warps = -(-needed // columns)
        slots = multiprocessors * max(1, resident(warps) // warps)
        spans = max(1, min(slots // (self.walks * columns), -(-self.chunks // 8)))
        if self.max_span:
            spans = max(spans, -(-self.length // self.max_span))
        span = -(-self.chunks // spans)
        return Cut(warps, columns, span * _SAVED, -(-self.chunks // span))

    def forward_cut(self) -> Cut:
        return self._cut(32, _FORWARD_WARPS, _FORWARD_RESIDENT,
                         lambda n: _forward_shared(self.rank, self.states, n, RUN))

    def backward_cut(self) -> tuple[Cut, int]:
        """And bytes of shared memory."""
        kept = 1 if self.type != 'Float' else 2 * self.sequence

        def shared(warps: int) -> int:
            return _backward_shared(self.rank, self.states, warps, kept)

        # As in the launch bounds; memory for 12 alone, which sm_110 has too, is not enough.
        warps = 12 if torch.cuda.get_device_capability(self.index)[0] in (9, 10) else 8
        cut = self._cut(_backward_width(self.states), warps, warps, shared)
        return cut, shared(cut.warps)

    def bind(self, cut: Cut, shared: int, strides: tuple[int, ...], written: torch.dtype,
             part: torch.dtype, instance: Callable[..., Instance], *args) -> Callable[..., None]:
        """Of addresses: x, raw, B, C, prepared, and those from ``entries`` on as in walk.cuh."""
        launch = kernel(self.index, instance, self.type, self.states, self.sequence, *args).bind(
            (self.walks * cut.spans * cut.columns, 1, 1), (32 * cut.warps, 1, 1), shared)
        batch, dim, height, width, rank, routes = self.sizes
        shape = (*strides, batch, dim, height, width, rank, self.state, routes, self.groups,
                 cut.span, cut.spans, self.chunks, cut.columns, int(self.softplus), CODES[written],
                 CODES[part])
        last, offsets = (magic(height), magic(width)), self.offsets
        rows = self.sequence and self.length % 8 == 0

        def run(x, raw, B, C, prepared, *others):
            y, grad, grad_x, grad_raw = others[4:8]
            vector = int(rows and (x | raw | y | grad | grad_x | grad_raw) % 16 == 0)
            launch(x, raw, B, C, *[prepared + n for n in offsets], *others, *shape, vector, *last)

        return run

    def entering(self, cut: Cut, mode: int, strides: tuple[int, ...], dtype: torch.dtype):
        """Bytes of memory, and what finds there what enters each span: it takes what :meth:`bind`
        takes first (a tuple), grad, and the memory, and gives the address."""
        if cut.spans == 1:
            return 0, lambda *_: 0
        warps, columns = self.forward_cut()[:2]
        inner = self.states * self.dim
        size, sizes = 4 * self.walks * cut.spans * inner, (self.walks, cut.spans, inner, 0)
        summarise = self.bind(
            cut._replace(warps=warps, columns=columns),
            _forward_shared(self.rank, self.states, warps, mode), strides, dtype, dtype,
            forward_instance, mode)
        combine = kernel(self.index, combine_instance).bind(
            (-(-self.walks * inner // 128), 1, 1), (128, 1, 1))

        def run(first, grad, memory):
            decays, ends, entries = memory, memory + size, memory + 2 * size
            summarise(*first, 0, 0, decays, ends, 0, grad, 0, 0, 0, 0, 0)
            combine(decays, ends, entries, *sizes)
            return entries

        return 3 * size, run


def _strides(sizes: tuple[int, ...], sequence: bool) -> tuple[int, ...]:
    """Of a map (B, D, H, W) with the channels last, or a sequence, without gaps."""
    _, dim, height, width, _, routes = sizes
    if sequence:
        return routes * dim * width, width, width, 1
    return height * width * dim, 1, width * dim, dim


def _prepared_offsets(sizes: tuple[int, ...], state: int) -> list[int]:
    """Bytes: where each part of what ``walk_prepare`` writes begins, and where the last ends."""
    plain = sizes[1] * sizes[5]
    states, groups = groups_of(state)
    weights, rates = plain * sizes[4], plain * groups * states
    return [0, 4 * (weights + rates), 4 * weights, 4 * (weights + rates + plain),
            4 * (weights + rates + 2 * plain)]


def prepared_size(sizes: tuple[int, ...], state: int) -> int:
    """Elements, fp32, of what :func:`prepare_launch` writes."""
    return _prepared_offsets(sizes, state)[-1] // 4


# --- launches, of addresses -----------------------------------------------------------------------
# For sizes (batch, dim, height, width, rank, routes); of selective_scan dim is that of a group,
# height 1 and rank 0.

@cached
def prepare_launch(index: int, sizes: tuple[int, ...], state: int,
                   dtypes: tuple[torch.dtype | None, ...], logs: bool, merged: bool = True
                   ) -> tuple[int, Callable[..., None]]:
    """Elements, fp32, of ``prepared``, which the others take, and what writes it.

    Of addresses: dt_projs_weight (K, D, R), dt_projs_bias (K, D), A (K * D, N) or with ``logs``
    log(-A), D (K * D), each of its dtype (0 and None for one that there is not), and ``prepared``.
    ``merged``: the results of the routes are added up.
    """
    *parts, size = _prepared_offsets(sizes, state)
    states, groups = groups_of(state)
    launch = kernel(index, prepare_instance).bind((min(1024, -(-size // 1024)), 1, 1), (256, 1, 1))
    rest = (sizes[1], sizes[4], state, groups * states, sizes[5], int(merged),
            *[CODES.get(d, 0) for d in dtypes], int(logs))
    return size // 4, lambda *addresses: launch(
        *addresses[:4], *[addresses[4] + n for n in parts], *rest)


class Launch(NamedTuple):
    """``run``; the bytes of memory that it needs; of a backward the parts that are to be summed, of
    ``dprojected`` (of the gradients by B and C, of selective_scan) and of ``sums``."""
    run: Callable[..., None]
    memory: int
    columns: int = 1
    parts: int = 1


@cached
def forward_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                   strides: tuple[int, ...] | None = None, *, sequence: bool = False,
                   softplus: bool = True, written: torch.dtype | None = None) -> Launch:
    """The forward, for x (B, D, H, W) of ``dtype``, and of ``strides`` unless it is channels-last
    without gaps.

    Of addresses: x, projected (B * L, K * (R + 2 N)) of ``dtype``, prepared, maps (G, K, B, H, W,
    D) and states (:func:`states_shape`, fp32), each written where it is not 0, and memory. G and
    the maps' dtype: :func:`groups_of`, :func:`maps_dtype` of ``written`` or else ``dtype``.

    With ``sequence``: u, delta (B, K * D, L), prepared, y (G, B, K * D, L), states, memory, B and
    C (B, K, N, L).
    """
    walk = Walk(index, dtype, sizes, state, sequence, softplus)
    plain = _strides(sizes, sequence)
    strides, cut = (*(strides or plain), *plain), walk.forward_cut()
    shared = _forward_shared(walk.rank, walk.states, cut.warps, RUN)
    scan = walk.bind(cut, shared, strides, maps_dtype(written or dtype, state), dtype,
                     forward_instance, RUN)
    bytes_, enter = walk.entering(cut, ENDS, strides, dtype)

    def run(x, projected, prepared, maps, states, memory, B=0, C=0):
        first = x, projected, B, C, prepared
        scan(*first, enter(first, 0, memory), states, 0, 0, maps, 0, 0, 0, 0, 0, 0)

    return Launch(run, bytes_)


@cached
def backward_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], state: int,
                    strides: tuple[int, ...] | None = None,
                    grad_strides: tuple[int, ...] | None = None, *, sequence: bool = False,
                    softplus: bool = True) -> Launch:
    """The backward of :func:`forward_launch`.

    Of addresses: x, projected, prepared, states, grad (of ``dtype``, by the sum of the maps), maps
    (by x, as in the forward), dprojected (columns, like projected), sums (parts, K, G, states + R +
    2, D, fp32: of A, dt_projs_weight, dt_projs_bias and D), and memory. dprojected has ``dtype``
    where there is one column, else fp32; with G > 1 it is to be zero before.

    With ``sequence`` dprojected is by delta, like y, and after memory come B, C, and the gradients
    by them (columns, B, K, N, L).
    """
    walk = Walk(index, dtype, sizes, state, sequence, softplus)
    plain = _strides(sizes, sequence)
    strides = *(strides or plain), *(grad_strides or plain)
    cut, shared = walk.backward_cut()
    columns = cut.columns if sequence else cut.columns * walk.groups
    scan = walk.bind(cut, shared, strides, maps_dtype(dtype, state),
                     dtype if columns == 1 else torch.float32, backward_instance)
    bytes_, enter = walk.entering(cut, GRADIENTS, strides, dtype)

    def run(x, projected, prepared, states, grad, maps, dprojected, sums, memory, B=0, C=0,
            grad_B=0, grad_C=0):
        first = x, projected, B, C, prepared
        scan(*first, enter(first, grad, memory), states, 0, 0, 0, grad, maps, dprojected, grad_B,
             grad_C, sums)

    return Launch(run, bytes_, columns, sizes[0] * cut.spans)


@cached
def finish_launch(index: int, sizes: tuple[int, ...], state: int,
                  dtypes: tuple[torch.dtype | None, ...], parts: int) -> Callable[..., None]:
    """The gradients by the parameters of :func:`prepare_launch`, of these dtypes, from ``parts`` of
    ``sums``.

    Of addresses: sums, the gradients (each written where it is not 0), and log(-A), by which the
    gradient is then, or 0.
    """
    dim, rank, routes = sizes[1], *sizes[4:]
    states, groups = groups_of(state)
    launch = kernel(index, finish_instance).bind(
        (-(-routes * (state + rank + 2) * dim // 32), 1, 1), (32, 8, 1))
    rest = (parts, dim, rank, state, states, routes, groups, *[CODES.get(d, 0) for d in dtypes])
    return lambda *addresses: launch(*addresses, *rest)


# --- what both ops do with tensors ----------------------------------------------------------------

def prepare(sizes: tuple[int, ...], parameters: tuple[Tensor | None, ...], logs: bool = False,
            merged: bool = True) -> Tensor:
    """``prepared``, of the four parameters of :func:`prepare_launch`, None for 0."""
    parameters = [None if t is None else t.contiguous() for t in parameters]
    A = parameters[2]
    size, run = prepare_launch(A.get_device(), sizes, A.shape[1], _dtypes(parameters), logs, merged)
    prepared = A.new_empty(size, dtype=torch.float32)
    run(*map(pointer, parameters), prepared.data_ptr())
    return prepared


def merge_groups(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """One result of ``dtype`` for those of the walks that share a channel's states."""
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
    finish_launch(sums.get_device(), sizes, A.shape[1], _dtypes(grads), len(sums))(
        sums.data_ptr(), *map(pointer, grads), A.data_ptr() if logs else 0)
    return grads


def _dtypes(tensors) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)
