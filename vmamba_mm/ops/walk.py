"""Launches of the CUDA "walk" kernels, which ss2d_scan and selective_scan share.

A walk is a route of ss2d_scan over an image, or a sequence of selective_scan;
``kernels/README.md`` says how they work. fp16 and fp32 need sm_75, bf16 sm_80; any number of
states, 16 to a walk: more are several walks.
"""

from functools import cache

import torch
from torch import Tensor

from vmamba_mm.ops.nvrtc import Instance, cached, load

TYPES = {torch.float32: 'Float', torch.float16: 'Half', torch.bfloat16: 'BFloat'}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SAVED = 24  # positions between saved states, as in walk.cuh
# Warps of a block at most, as in the launch bounds, and of a multiprocessor, by registers
_FORWARD_WARPS, _FORWARD_RESIDENT = 6, 24
RUN, ENDS, GRADIENTS = range(3)


@cache
def prepare_instance() -> Instance:
    return Instance('walk_prepare.cu', 'walk_prepare', 'P' * 8 + 'i' * 10)


@cache
def combine_instance() -> Instance:
    return Instance('scan_combine.cu', 'scan_combine<8>', 'PPPiiii')


_PARAMS = 'P' * 19 + 'q' * 8 + 'i' * 18


@cache
def forward_instance(type_: str, states: int, sequence: bool, mode: int) -> Instance:
    """``states`` of a walk: 1, 4 or 16; ``mode`` is RUN, ENDS or GRADIENTS."""
    return Instance('walk_fwd.cu', f'walk_fwd<{type_}, {states}, {str(sequence).lower()}, '
                    f'{mode}>', _PARAMS)


@cache
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


class Walk:
    """The launches of one op's forward or backward: sizes, parameters, spans.

    Args:
        x: (B, D, H, W) map, or u as (B, K * D, 1, L); any strides for a map.
        parameters: dt_projs_weight (K, D, R) or None, its bias (K * D values) or None, A (K*D, N),
            D (K * D values) or None.
        sequence: for selective_scan.
    """

    max_span = None  # for tests: positions after which a walk is cut
    softplus = 1

    def __init__(self, x: Tensor, routes: int, rank: int, parameters, sequence: bool):
        self.x, self.sequence = x, sequence
        self.batch, channels, self.height, self.width = x.shape
        self.dim = channels // routes if sequence else channels
        self.routes, self.rank, self.state = routes, rank, parameters[2].shape[1]
        self.length = self.height * self.width
        self.states, self.groups = groups_of(self.state)
        self.chunks = -(-self.length // _SAVED)
        self.type = TYPES[x.dtype]
        self.walks = self.batch * routes * self.groups
        plain, padded = routes * self.dim, self.groups * self.states
        prepared = self.empty(plain * (rank + padded + 2))
        self.weights = prepared.data_ptr()
        self.rates = self.weights + 4 * plain * rank
        self.bias = self.rates + 4 * plain * padded
        self.skip = self.bias + 4 * plain
        self.prepared = prepared  # the addresses above are into it
        parameters = [None if t is None else t.contiguous() for t in parameters]
        load(prepare_instance(), x.device).launch(
            (min(1024, -(-prepared.numel() // 256)), 1, 1), (256, 1, 1),
            (*map(pointer, parameters), self.weights, self.bias, self.rates, self.skip, self.dim,
             rank, self.state, padded, routes, int(not sequence),
             *(0 if t is None else CODES[t.dtype] for t in parameters)))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def maps(self, dtype: torch.dtype) -> Tensor:
        """For results of each walk, fp32 where several are to be added for one."""
        dtype = dtype if self.groups == 1 else torch.float32
        if self.sequence:
            return self.empty(self.groups, self.batch, self.routes * self.dim, self.length,
                              dtype=dtype)
        return self.empty(self.groups, self.routes, self.batch, self.height, self.width, self.dim,
                          dtype=dtype)

    def merge_groups(self, maps: Tensor, dtype: torch.dtype) -> Tensor:
        return maps[0] if self.groups == 1 else maps.sum(0).to(dtype)

    def _cut(self, width: int, of_a_block: int, most: int, shared) -> tuple[int, int, int, int]:
        """(warps, blocks side by side, positions of a span, spans): few walks are cut.

        Args:
            width: channels of a warp.
            of_a_block, most: warps of a block and of a multiprocessor at most.
            shared: bytes of a block by its warps.
        """
        multiprocessors, of_all, of_block = device_limits(self.x.device.index)

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
        return warps, columns, span * _SAVED, -(-self.chunks // span)

    def forward(self, raw: Tensor, B: Tensor | None, C: Tensor | None, y: Tensor | None,
                states: Tensor | None) -> None:
        """Fill ``y`` and ``states``, where given."""
        def run(mode, **buffers):
            self._launch(forward_instance(self.type, self.states, self.sequence, mode), cut,
                         _forward_shared(self.rank, self.states, cut[0], mode), raw=raw, B=B, C=C,
                         **buffers)

        cut = self._forward_cut()
        run(RUN, entries=self._entries(run, ENDS, cut), y=y, states=states)

    def backward(self, raw: Tensor, B: Tensor | None, C: Tensor | None, states: Tensor,
                 grad: Tensor, grad_x: Tensor, outputs) -> Tensor:
        """Fill ``grad_x`` and what ``outputs(columns)`` gives by name.

        Returns:
            fp32 (K, G, states + R + 2, D): gradients by A, dt_projs_weight, dt_projs_bias and D.
        """
        def summarise(mode, **buffers):
            self._launch(forward_instance(self.type, self.states, self.sequence, mode),
                         (forward_warps, forward_columns, *cut[2:]),
                         _forward_shared(self.rank, self.states, forward_warps, mode), raw=raw,
                         B=B, C=C, grad=grad, **buffers)

        forward_warps, forward_columns = self._forward_cut()[:2]
        kept = 1 if self.type != 'Float' else 2 * self.sequence

        def shared(warps: int) -> int:
            return _backward_shared(self.rank, self.states, warps, kept)

        # As in the launch bounds; memory for 12 alone, which sm_110 has too, is not enough.
        warps = 12 if torch.cuda.get_device_capability(self.x.get_device())[0] in (9, 10) else 8
        cut = self._cut(_backward_width(self.states), warps, warps, shared)
        sums = self.empty(self.batch * cut[3], self.routes, self.groups,
                          self.states + self.rank + 2, self.dim)
        self._launch(backward_instance(self.type, self.states, self.sequence), cut,
                     shared(cut[0]), raw=raw, B=B, C=C,
                     states=states, grad=grad, grad_x=grad_x, sums=sums,
                     entries=self._entries(summarise, GRADIENTS, cut), **outputs(cut[1]))
        return sums.sum(0)

    def _forward_cut(self):
        return self._cut(32, _FORWARD_WARPS, _FORWARD_RESIDENT,
                         lambda n: _forward_shared(self.rank, self.states, n, RUN))

    def _entries(self, run, mode: int, cut) -> Tensor | None:
        """What enters each span, (walks, spans, states, D); None for one span."""
        spans = cut[3]
        if spans == 1:
            return None
        decays, ends, entries = (self.empty(self.walks, spans, self.states, self.dim)
                                 for _ in range(3))
        run(mode, decays=decays, ends=ends)
        inner = self.states * self.dim
        load(combine_instance(), self.x.device).launch(
            (-(-self.walks * inner // 128), 1, 1), (128, 1, 1),
            (decays.data_ptr(), ends.data_ptr(), entries.data_ptr(), self.walks, spans, inner,
             0))
        return entries

    def _launch(self, instance: Instance, cut, shared: int, *, raw, B=None, C=None, entries=None,
                states=None, decays=None, ends=None, y=None, grad=None, grad_x=None,
                grad_raw=None, grad_B=None, grad_C=None, sums=None) -> None:
        warps, columns, span, spans = cut
        x, result = self.x, y if grad_x is None else grad_x
        # fp32 or the map's own, as the kernels write them
        part = grad_B if grad_raw is None or self.sequence else grad_raw
        vector = self.length % 8 == 0 and all(
            t is None or t.data_ptr() % 16 == 0 for t in (x, raw, result, grad, grad_raw))
        load(instance, x.device).launch(
            (self.walks * spans * columns, 1, 1), (32 * warps, 1, 1),
            (x.data_ptr(), raw.data_ptr(), pointer(B), pointer(C), self.weights, self.bias,
             self.rates, self.skip, pointer(entries), pointer(states), pointer(decays),
             pointer(ends), pointer(y), pointer(grad), pointer(grad_x), pointer(grad_raw),
             pointer(grad_B), pointer(grad_C), pointer(sums), *x.stride(),
             *(x.stride() if grad is None else grad.stride()), self.batch, self.dim, self.height,
             self.width, self.rank, self.state, self.routes, self.groups, span, spans,
             self.chunks, columns, self.softplus, 0 if result is None else CODES[result.dtype],
             0 if part is None else CODES[part.dtype], int(vector), magic(self.height),
             magic(self.width)), shared)
