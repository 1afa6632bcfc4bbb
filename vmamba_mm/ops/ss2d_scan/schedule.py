"""How the work of the N = 1 kernels is scheduled on a GPU: warps, blocks, spans, shared memory.

The images of a batch are one sequence of slots (7 positions) and chunks (8 slots); a block has
some of the channels, 16 to a warp, and scans a span of chunks (``kernels/README.md``). There are
three kinds of schedules, and :func:`plan_of` takes the cheapest of all that fit:

- independent: a span has whole images, so nothing enters it.
- chained: a span begins within an image, and the state at the end of the one before enters it.
- cluster: the chunks of a span go around several sets of warps, and the blocks of a cluster; whole
  images again, for the forward on GPUs of compute capability 9.0 or higher.

Costs are in chunks of one warp on one multiprocessor, which 8 warps keep busy: a multiprocessor
with 8 warps or more that scan one chunk each takes as many units as it has warps. Their constants
were fitted to launches timed on an H100, fp16; where one measurement decides, it is named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from vmamba_mm.ops.core.launch import cached, kernel
from vmamba_mm.ops.scan_kernels.cuda import combine_instance, magic

SLOT = 7                      # OWN in ss2d_scan.cuh: positions of a slot
CHUNK = 8 * SLOT              # positions of a chunk
UNIT_BYTES = CHUNK * 16       # staged for 8 columns of a chunk of the projected input
PAD_BYTES = 128               # after the last of these
MAP_BYTES = CHUNK * 32        # of a warp's channels of a map, for a chunk
_RESERVED_BYTES = 1024        # of shared memory, by the driver for each block
_MOST_BLOCKS = 65535          # of a grid, along its second and third side


class Schedule(NamedTuple):
    """The grid of one launch, and what it is expected to cost."""
    maps: int         # that it writes: one for each route, or for the two routes of an axis
    warps: int        # of a block
    columns: int      # blocks side by side, which share the channels
    span: int         # chunks of a span
    spans: int
    image_chunks: int  # after so many, an image begins with a chunk again
    shared: int       # bytes of shared memory of a block
    independent: bool  # whether spans begin with an image, so that nothing enters them
    cost: float
    sets: int = 1     # of a block's warps, and ...
    cluster: int = 0  # ... blocks that the chunks of a span go around; 0: a warp has them all


class Plan(NamedTuple):
    """Sizes that depend on shapes and the GPU alone."""
    routes: int
    tiles: int    # of 8 columns of dt
    row: int      # P: elements of a staged row
    groups: int   # of 16 channels
    slots: int    # of an image
    chunks: int   # of the batch
    magic: tuple[int, int, int]
    offsets: tuple[int, ...]  # bytes: where each part of `saved` begins, and where the last ends
    forward: Schedule
    backward: Schedule


# --- what a forward and a backward need -----------------------------------------------------------

@dataclass(frozen=True)
class Chain:
    """The needs and costs of chained spans beyond those of independent ones."""
    staged_chunks: int    # more in shared memory
    bytes_per_warp: int   # more
    slowdown: float       # factor of the cost
    launches: float       # cost of further launches
    start: float          # cost of a block's start, in chunks
    split_pixels: float   # cost of having a pixel's channels in several blocks
    far_span: float       # chunks after which what is written at a time lies twice too far apart


@dataclass(frozen=True)
class Pass:
    """The forward or the backward kernel, as far as a schedule depends on it."""
    warps: int                       # of a block at most, 16 channels each
    blocks_per_multiprocessor: int   # of so many warps, by registers: as in the launch bounds
    staged_chunks: int               # of the projected input, in a block's shared memory
    bytes_per_block: int
    bytes_per_warp: int
    bytes_per_warp_and_tile: int
    bytes_per_route: int             # of a warp, for each route that it scans
    bytes_per_route_and_tile: int
    merge_saving: float              # part of the cost that writing half as many maps saves
    l2_reach: float                  # of L2, at most, between a write and the addition to it
    chain: Chain

    def shared_bytes(self, sizes: '_Sizes', warps: int, routes_per_map: int,
                     independent: bool) -> int:
        """Bytes of shared memory of a block."""
        staged = self.staged_chunks
        per_warp = self.bytes_per_warp + sizes.tiles * self.bytes_per_warp_and_tile
        per_route = self.bytes_per_route + sizes.tiles * self.bytes_per_route_and_tile
        if not independent:
            staged += self.chain.staged_chunks
            per_warp += self.chain.bytes_per_warp
        return (self.bytes_per_block + staged * sizes.staged_bytes
                + warps * (per_warp + routes_per_map * per_route))


FORWARD = Pass(
    warps=8,
    blocks_per_multiprocessor=2,
    staged_chunks=3,        # STAGES in ss2d_scan_fwd.cu
    bytes_per_block=64,     # mbarriers
    bytes_per_warp=64,      # skip
    bytes_per_warp_and_tile=0,
    bytes_per_route=192,    # bias, rates
    bytes_per_route_and_tile=256,  # dt_projs_weight as the tensor cores take it
    merge_saving=0.06,      # 2 maps for 4 to merge, less the additions to one of them
    # An addition waits for what has left L2: on an H100 (50 MB) with 53 MB between a write and the
    # addition to it (28x28) two maps were faster, with 159 MB (56x56) slower by 7 %.
    l2_reach=1.5,
    # ss2d_scan_chained.cu, one launch. It stages a chunk more, and x by way of shared memory. On an
    # H100 blocks with all the channels of a pixel took 309 us, where two shared them 399 (4 images
    # of 256x256, 96 channels): hence split_pixels. docs/kernels-journal.md has the table.
    chain=Chain(staged_chunks=1, bytes_per_warp=2 * MAP_BYTES, slowdown=1.35, launches=0, start=2,
                split_pixels=0.3, far_span=500))

BACKWARD = Pass(
    warps=12,
    blocks_per_multiprocessor=1,
    staged_chunks=2,
    bytes_per_block=0,
    # Four maps (x, dy and the sums over channels), bias, rates, skip, and the sums over positions.
    bytes_per_warp=4 * MAP_BYTES + 384 + 2048,
    bytes_per_warp_and_tile=768,   # dt_projs_weight and its gradient
    bytes_per_route=0,
    bytes_per_route_and_tile=0,
    # On an H100, 0.18 ms of merge became 0.13, and the scan stayed at 0.69: a backward has other
    # work while it waits for additions, so they may be anywhere.
    merge_saving=0.1,
    l2_reach=math.inf,
    # Three launches: what a span does to a carry, what enters each span, the scan itself. Two more
    # than independent spans have, which are worth 16 chunks.
    chain=Chain(staged_chunks=0, bytes_per_warp=0, slowdown=1.6, launches=16, start=0.5,
                split_pixels=0, far_span=math.inf))

#: Warps that a multiprocessor holds of the forward kernel for clusters; 16 gained nothing and 18
#: spilled, on an H100.
CLUSTER_WARPS = 12
#: Blocks of a cluster. An H100 may hold 15 clusters of 8, not 16, as one of its parts can have
#: fewer than 16 multiprocessors: hence 7.
CLUSTER_SIZES = (1, 2, 4, 7, 8)
_CLUSTER_BLOCK_BYTES = 256   # mbarriers of all sets
_MAILBOX_BYTES = 80          # of a warp


class _Sizes(NamedTuple):
    """A scan, divided into so many slots for each image."""
    routes: int
    groups: int        # of 16 channels
    tiles: int         # of 8 columns of dt
    rank: int
    staged_bytes: int  # of a chunk of a route's projected input
    chunks: int        # of the batch
    image_chunks: int  # as in a Schedule


# --- what a schedule costs ------------------------------------------------------------------------

def _busy_warps(warps: float) -> float:
    """The units that a multiprocessor takes for a chunk of each of its warps, on an H100: fewer
    than 8 warps are no faster, and 16 take 5 % less than by their number."""
    return max(8, warps * (0.95 if warps > 12 else 1))


def independent_cost(work: Pass, waves: int, span: int, columns: int, routes_per_map: int,
                     warps: float) -> float:
    """Cost of spans of whole images, with ``warps`` on the fullest multiprocessor.

    A block's start is worth half a chunk. Many blocks for the channels stage the projected input
    once each, of little consequence (0.4 % a block).
    """
    cost = waves * (span * routes_per_map + 0.5) * _busy_warps(warps)
    return cost * ((1 + 0.004 * columns) * (1 if routes_per_map == 1 else 1 - work.merge_saving))


def chained_cost(work: Pass, waves: int, span: int, columns: int, warps: float) -> float:
    """Cost of spans within an image, see :class:`Chain`."""
    chain = work.chain
    cost = chain.slowdown * waves * (span + chain.start) * (1 + span / chain.far_span)
    cost *= 1 + chain.split_pixels * (1 - 1 / columns + columns / 30)
    return cost * _busy_warps(warps) + chain.launches


def cluster_cost(waves: int, span: int, columns: int, takers: int, warps: int) -> float:
    """Cost of spans of whole images whose chunks go around so many ``takers`` (sets of warps in all
    blocks of a cluster), with ``warps`` on the fullest multiprocessor.

    Either the warps calculate all the time, or they wait for the state, which takes 0.46 of a unit
    from chunk to chunk (0.12 us on an H100 for 1x200x320x96, where a warp takes 2.4 us for a chunk)
    and 1.5 % more for each warp beside. A launch of clusters costs 6 more than one without.
    """
    calculating = 0.97 * (span / takers + 0.5) * max(11.5, warps)
    handing_on = 0.46 * span * (1 + 0.015 * warps)
    return 6 + waves * max(calculating, handing_on) * (1 + 0.01 * math.sqrt(columns))


# --- candidates -----------------------------------------------------------------------------------

def _channel_blocks(groups: int, most_warps: int) -> Iterator[tuple[int, int]]:
    """Ways to divide the groups of channels: (blocks, warps of each, at least 2)."""
    for columns in {-(-groups // warps) for warps in range(2, most_warps + 1)}:
        yield columns, max(2, -(-groups // columns))


def span_schedules(work: Pass, sizes: _Sizes, gpu: Any) -> Iterator[Schedule]:
    """Independent and chained schedules; ``gpu``: the properties of the device."""
    routes, multiprocessors = sizes.routes, gpu.multi_processor_count
    limit = gpu.shared_memory_per_block_optin - _RESERVED_BYTES
    if work.shared_bytes(sizes, 2, 1, True) > limit:
        raise ValueError(f'dt_rank={sizes.rank} needs more shared memory than the {limit} bytes of '
                         f'this GPU')
    # Two routes into one map need whole images, and an addition to half-precision memory.
    fewest_maps = 2 if routes == 4 and gpu.major >= 9 else routes
    for columns, warps in _channel_blocks(sizes.groups, work.warps):
        for maps, independent in {(fewest_maps, True), (routes, True), (routes, False)}:
            shared = work.shared_bytes(sizes, warps, routes // maps, independent)
            if shared > limit:
                continue
            at_once = multiprocessors * min(
                work.blocks_per_multiprocessor * work.warps // warps,
                gpu.shared_memory_per_multiprocessor // (shared + _RESERVED_BYTES))
            unit, blocks_of_span = sizes.image_chunks if independent else 1, columns * maps
            for spans in {max(1, n * at_once // blocks_of_span) for n in (1, 2, 3, 4)}:
                span = -(-sizes.chunks // (unit * spans)) * unit
                spans = -(-sizes.chunks // span)
                if spans > _MOST_BLOCKS or (spans == 1 and not independent):
                    continue
                waves = -(-blocks_of_span * spans // at_once)
                resident = min(at_once, blocks_of_span * spans) / multiprocessors
                if work.blocks_per_multiprocessor > 1:  # the fullest multiprocessor decides
                    resident = math.ceil(resident)
                resident *= warps
                between = resident * sizes.image_chunks * MAP_BYTES * multiprocessors
                if maps < routes and between > work.l2_reach * gpu.L2_cache_size:
                    continue
                if independent:
                    cost = independent_cost(work, waves, span, columns, routes // maps, resident)
                else:
                    cost = chained_cost(work, waves, span, columns, resident)
                yield Schedule(maps, warps, columns, span, spans, sizes.image_chunks, shared,
                               independent, cost)


@cached
def clusters_at_once(index: int, cluster: int, blocks: int) -> int:
    """Clusters that the GPU holds at once, if a multiprocessor has room for so many blocks."""
    memory = torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor
    return kernel(index, combine_instance).clusters(cluster, 32, memory // blocks - _RESERVED_BYTES)


def cluster_schedules(sizes: _Sizes, index: int, gpu: Any) -> Iterator[Schedule]:
    """Schedules of the forward in which chunks go around the blocks of a cluster."""
    images = -(-sizes.chunks // sizes.image_chunks)
    bytes_per_warp = (FORWARD.bytes_per_warp + FORWARD.bytes_per_route
                      + FORWARD.bytes_per_route_and_tile * sizes.tiles + _MAILBOX_BYTES)
    for columns, width in _channel_blocks(sizes.groups, CLUSTER_WARPS):
        for sets in range(1, CLUSTER_WARPS // width + 1):
            warps = width * sets
            shared = (_CLUSTER_BLOCK_BYTES + FORWARD.staged_chunks * sizes.staged_bytes * sets
                      + warps * bytes_per_warp)
            blocks = min(CLUSTER_WARPS // warps,
                         gpu.shared_memory_per_multiprocessor // (shared + _RESERVED_BYTES))
            if blocks == 0 or shared > gpu.shared_memory_per_block_optin - _RESERVED_BYTES:
                continue
            for cluster in CLUSTER_SIZES:
                if cluster * sets == 1:
                    continue
                at_once = clusters_at_once(index, cluster, blocks)
                if at_once == 0:
                    continue
                spans = max(1, at_once // (sizes.routes * columns))
                span = -(-images // spans) * sizes.image_chunks
                spans = -(-sizes.chunks // span)
                if spans * cluster > _MOST_BLOCKS:
                    continue
                clusters = sizes.routes * columns * spans
                resident = warps * min(
                    blocks, -(-clusters * cluster // gpu.multi_processor_count))
                cost = cluster_cost(-(-clusters // at_once), span, columns, cluster * sets,
                                    resident)
                yield Schedule(sizes.routes, warps, columns, span, spans, sizes.image_chunks,
                               shared, True, cost, sets, cluster)


# --- the plan -------------------------------------------------------------------------------------

@cached
def plan_of(batch: int, dim: int, height: int, width: int, rank: int, routes: int,
            index: int) -> Plan:
    """The cheapest schedules for a scan on this GPU.

    Raises:
        ValueError: if ``rank`` needs more shared memory than a block can have.
    """
    length, row = height * width, row_of(rank)
    groups, tiles = -(-dim // 16), -(-rank // 8)
    gpu = torch.cuda.get_device_properties(index)

    def schedules(slots: int) -> tuple[int, Schedule, Schedule]:
        sizes = _Sizes(routes, groups, tiles, rank, row // 8 * UNIT_BYTES + PAD_BYTES,
                       -(-batch * slots // 8), slots // math.gcd(slots, 8))
        forward = list(span_schedules(FORWARD, sizes, gpu))
        if gpu.major >= 9:
            forward += cluster_schedules(sizes, index, gpu)
        backward = span_schedules(BACKWARD, sizes, gpu)
        return slots, min(forward, key=_cost), min(backward, key=_cost)

    # An image has as many slots as it needs, or so many that every image begins with a chunk. The
    # backward's cost counts twice: its kernel takes about twice as long for a chunk.
    exact = -(-length // SLOT)
    slots, forward, backward = min(
        map(schedules, {exact, -(-exact // 8) * 8}),
        key=lambda candidate: candidate[1].cost + 2 * candidate[2].cost)
    offsets = accumulate((2 * size for size in saved_sizes(batch, dim, length, rank, routes)),
                         initial=0)
    return Plan(routes, tiles, row, groups, slots, -(-batch * slots // 8),
                (magic(height), magic(width), magic(slots)), tuple(offsets), forward, backward)


def _cost(schedule: Schedule) -> float:
    return schedule.cost


def row_of(rank: int) -> int:
    """P, the elements of a row of the projected input: dt, an even number, B and C, in units."""
    return 8 * max(-(-(rank + rank % 2 + 2) // 8), -(-rank // 8))


def saved_sizes(batch: int, dim: int, length: int, rank: int, routes: int) -> tuple[int, ...]:
    """Half-precision elements of the parts of ``saved``, which a backward needs: x_proj_weight
    (K * P, D); the fragments of dt_projs_weight, bias, A and D in fp32 as the kernels take them;
    the states."""
    padded = -(-dim // 16) * 16
    chunks = batch * -(-length // CHUNK)  # or more than there are
    return (routes * row_of(rank) * dim, 8 * routes * padded * -(-rank // 8), 2 * routes * padded,
            2 * routes * padded, 2 * padded, 2 * routes * chunks * dim)
