"""How the N = 1 kernels' work is cut for a GPU: warps, blocks, spans, and what they keep."""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.nvrtc import cached, kernel
from vmamba_mm.ops.scan_kernels.cuda import combine_instance, magic

_SLOT = 7  # positions of a slot; a warp takes a chunk of 8 slots at a time
_CHUNK_MAP = 8 * _SLOT * 32  # bytes of a warp's part of a map
# Warps that a block may have (16 channels each), and blocks of so many that fit a multiprocessor.
FORWARD_WARPS, FORWARD_BLOCKS = 8, 2
BACKWARD_WARPS, BACKWARD_BLOCKS = 12, 1
# Where chunks go around: warps of a multiprocessor, and blocks of a cluster. Of clusters of 8 an
# H100 may hold 15, not 16, for want of one part with 16 multiprocessors: hence 7.
AROUND_WARPS, CLUSTERS = 12, (1, 2, 4, 7, 8)


class Cut(NamedTuple):
    """A launch: maps that it writes, warps of a block, blocks for the channels, spans of so many
    chunks, chunks of whole images, shared bytes; whether the spans begin at an image, so that
    nothing enters them; what it costs."""
    maps: int
    warps: int
    columns: int
    span: int
    spans: int
    alone: int
    shared: int
    independent: bool
    cost: float
    sets: int = 1     # of a block's warps, and of
    cluster: int = 0  # blocks, which the chunks of a span go around; 0: a warp has them all


class Plan(NamedTuple):
    """Sizes that depend on shapes and the GPU alone."""
    routes: int
    tiles: int    # of 8 columns of dt
    row: int      # P: elements of a staged row
    groups: int   # of 16 channels
    slots: int    # of 7 positions, of an image
    chunks: int   # of 8 slots, of the batch
    magic: tuple[int, int, int]
    offsets: tuple[int, ...]  # bytes, of the parts of `kept` and of its end
    forward: Cut
    backward: Cut


class _Spans(NamedTuple):
    """Spans that something enters: shared bytes more of a block and a warp; what they cost more, by
    a factor, for other launches and for the start of a block (in chunks), for a pixel's channels in
    several blocks, and for spans so long that what is written at a time lies far apart. Measured.
    """
    of_block: int
    per_warp: int
    factor: float
    launches: float
    start: float
    columns: float
    far: float

    def cost(self, waves: int, span: int, columns: int) -> float:
        cost = self.factor * waves * (span + self.start) * (1 + span / self.far)
        return cost * (1 + self.columns * (1 - 1 / columns + columns / 30))


@cached
def _clusters(index: int, cluster: int, blocks: int) -> int:
    """That the GPU holds at once, with so many blocks on a multiprocessor."""
    memory = torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor
    return kernel(index, combine_instance).clusters(cluster, 32, memory // blocks - 1024)


def _around(index: int, groups: int, tiles: int, staged: int, chunks: int, alone: int,
            routes: int) -> Iterator[Cut]:
    """Forward cuts where chunks go around. Costs are as those of plan_of, measured."""
    properties = torch.cuda.get_device_properties(index)
    multiprocessors = properties.multi_processor_count
    images = -(-chunks // alone)
    for columns in {-(-groups // width) for width in range(2, AROUND_WARPS + 1)}:
        width = max(2, -(-groups // columns))
        for sets in range(1, AROUND_WARPS // width + 1):
            warps = width * sets
            shared = 256 + 3 * staged * sets + warps * (256 * tiles + 192 + 64 + 80)
            blocks = min(AROUND_WARPS // warps,
                         properties.shared_memory_per_multiprocessor // (shared + 1024))
            if blocks == 0 or shared > properties.shared_memory_per_block_optin - 1024:
                continue
            for cluster in CLUSTERS:
                if cluster * sets == 1:
                    continue
                at_once = _clusters(index, cluster, blocks)
                if at_once == 0:
                    continue
                span = -(-images // max(1, at_once // (routes * columns))) * alone
                spans = -(-chunks // span)
                if spans * cluster > 65535:
                    continue
                walks = routes * columns * spans
                resident = warps * min(blocks, -(-walks * cluster // multiprocessors))
                # What the warps calculate, or that a state goes from chunk to chunk.
                cost = max(0.97 * (span / (cluster * sets) + 0.5) * max(11.5, resident),
                           0.46 * span * (1 + 0.015 * resident))
                cost = 6 + -(-walks // at_once) * cost * (1 + 0.01 * math.sqrt(columns))
                yield Cut(routes, warps, columns, span, spans, alone, shared, True, cost, sets,
                          cluster)


@cached
def plan_of(batch: int, dim: int, height: int, width: int, rank: int, routes: int,
            index: int) -> Plan:
    """The cheapest cut of the work for this GPU."""
    length, groups, tiles = height * width, -(-dim // 16), -(-rank // 8)
    row = row_of(rank)
    staged = row // 8 * 16 * 8 * _SLOT + 128
    properties = torch.cuda.get_device_properties(index)
    multiprocessors = properties.multi_processor_count
    limit = properties.shared_memory_per_block_optin - 1024

    def cuts(most, blocks, of_block, per_warp, per_route, entered, saved, reach, slots):
        if of_block + 2 * (per_warp + per_route) > limit:
            raise ValueError(f'dt_rank={rank} needs more shared memory than the {limit} bytes of '
                             f'this GPU')
        chunks = -(-batch * slots // 8)
        alone = slots // math.gcd(slots, 8)  # chunks until an image begins with a chunk
        for columns in {-(-groups // warps) for warps in range(2, most + 1)}:
            warps = max(2, -(-groups // columns))
            # Two routes into one map need whole images, and an addition to half-precision memory.
            fewest = 2 if routes == 4 and properties.major >= 9 else routes
            for maps, independent in {(fewest, True), (routes, True), (routes, False)}:
                unit, walks = alone if independent else 1, columns * maps
                shared = of_block + warps * (per_warp + routes // maps * per_route)
                if not independent:
                    shared += entered.of_block + warps * entered.per_warp
                if shared > limit:
                    continue
                at_once = multiprocessors * min(
                    blocks * most // warps,
                    properties.shared_memory_per_multiprocessor // (shared + 1024))
                for spans in {max(1, n * at_once // walks) for n in (1, 2, 3, 4)}:
                    span = -(-chunks // (unit * spans)) * unit
                    spans = -(-chunks // span)
                    if spans > 65535 or (spans == 1 and not independent):
                        continue
                    # In chunks of a warp on a multiprocessor, which 8 warps fill; for blocks that
                    # share one, on the fullest.
                    waves = -(-walks * spans // at_once)
                    resident = min(at_once, walks * spans) / multiprocessors
                    resident = warps * (math.ceil(resident) if blocks > 1 else resident)
                    if maps < routes and resident * alone * _CHUNK_MAP * multiprocessors > reach:
                        continue
                    # 16 warps take as long for a chunk of each as 12 do, less 5 %.
                    resident = max(8, resident * (0.95 if resident > 12 else 1))
                    if independent:  # a block's start is worth half a chunk
                        cost = waves * (span * routes // maps + 0.5) * resident
                        cost *= (1 + 0.004 * columns) * (1 if maps == routes else 1 - saved)
                    else:
                        cost = entered.cost(waves, span, columns) * resident + entered.launches
                    yield Cut(maps, warps, columns, span, spans, alone, shared, independent, cost)

    # What a map less to write and to add up saves; a forward waits for additions to what is not in
    # L2 any more (measured: 53 of 50 MB are fast, 159 slow), a backward has other things to do.
    l2 = properties.L2_cache_size
    best = None
    exact = -(-length // _SLOT)
    for slots in {exact, -(-exact // 8) * 8}:
        forward, backward = (min(cuts(*sizes, slots), key=lambda cut: cut.cost) for sizes in (
            (FORWARD_WARPS, FORWARD_BLOCKS, 64 + 3 * staged, 64, 256 * tiles + 192,
             _Spans(staged, 2 * _CHUNK_MAP, 1.35, 0, 2, 0.3, 500), 0.06, 1.5 * l2),
            (BACKWARD_WARPS, BACKWARD_BLOCKS, 2 * staged,
             4 * _CHUNK_MAP + 768 * tiles + 384 + 2048, 0, _Spans(0, 0, 1.6, 16, 0.5, 0, math.inf),
             0.1, math.inf)))
        if properties.major >= 9:
            chunks, alone = -(-batch * slots // 8), slots // math.gcd(slots, 8)
            around = _around(index, groups, tiles, staged, chunks, alone, routes)
            forward = min([forward, *around], key=lambda cut: cut.cost)
        if best is None or forward.cost + 2 * backward.cost < best[1].cost + 2 * best[2].cost:
            best = slots, forward, backward
    slots, forward, backward = best
    return Plan(routes, tiles, row, groups, slots, -(-batch * slots // 8),
                 (magic(height), magic(width), magic(slots)), (0, *accumulate(
                     2 * size for size in kept_sizes(batch, dim, length, rank, routes))),
                 forward, backward)


def row_of(rank: int) -> int:
    """P, the elements of a row of the projected input: dt, an even number, B and C, in units."""
    return 8 * max(-(-(rank + rank % 2 + 2) // 8), -(-rank // 8))


def kept_sizes(batch: int, dim: int, length: int, rank: int, routes: int) -> tuple[int, ...]:
    """Half-precision elements of the parts of ``kept``, which a backward needs: x_proj_weight
    (K * P, D); the fragments of dt_projs_weight, bias, A and D in fp32 as the kernels take them;
    the states."""
    padded = -(-dim // 16) * 16
    chunks = batch * -(-length // (8 * _SLOT))  # or more than there are
    return (routes * row_of(rank) * dim, 8 * routes * padded * -(-rank // 8), 2 * routes * padded,
            2 * routes * padded, 2 * padded, 2 * routes * chunks * dim)
