"""The launches of the backward of ``ssd``: the states that enter chunks and the gradients by those
that leave them, and then all chunks at once.

The states are in memory, so the samples of a large batch go in pieces of :data:`MOST_STATES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.launch import CODES, Slab, cached, device_limits, load
from vmamba_mm.ops.ssd import cuda_launch
from vmamba_mm.ops.ssd.cuda_launch import BackwardShape, Options, Sizes, States, Strides

#: Bytes of states that exist at a time, but for those of one sample.
MOST_STATES = 2**28
#: Blocks among which the heads of a group are divided, for tests.
max_split: int | None = None


def head_splits(index: int, blocks: int, sizes: Sizes, counts: list[int]) -> int:
    """Among how many blocks the heads of a group are divided, for launches on so many samples
    each, if a multiprocessor has so many ``blocks`` at a time: so that it takes the fewest turns,
    in which as many blocks as run at a time have a head each. Sums of parts take time too."""
    heads = sizes.heads // sizes.groups
    at_a_time = device_limits(index)[0] * blocks
    part = sum(counts) * sizes.length * sizes.groups * sizes.state / 3e6  # in turns

    def turns(splits):
        each = -(-heads // splits)
        of_sample = sizes.chunks * sizes.groups * -(-heads // each)
        rounds = sum(-(-count * of_sample // at_a_time) for count in counts)
        return rounds * each + part * (splits if splits > 1 else 0)

    splits = min(max_split, heads) if max_split else min(range(1, heads + 1), key=turns)
    return -(-heads // -(-heads // splits))


class BackwardLaunch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs. ``splits``: parts of the gradients by B and
    C, which are to be summed, if more than 1."""
    run: Callable[..., None]
    memory: int
    splits: int


class _Maps(NamedTuple):
    x: Strides
    dy: Strides
    dt: Strides
    B: Strides
    C: Strides
    dx: Strides
    ddt: Strides
    dB: Strides
    dC: Strides


class _Piece:
    """The launches for some samples of a batch."""

    def __init__(self, index: int, dtype: torch.dtype, fast: bool, batch: int, sizes: Sizes,
                 options: Options, maps: _Maps, shape: BackwardShape, splits: int):
        given = dict(zip(maps._fields[:5], maps[:5], strict=True))
        span, self.spans = cuda_launch.span_of(index, sizes, 2 * sizes.batch * sizes.heads)
        states = States(index, dtype, fast, sizes, options, given, span, self.spans)
        slab = Slab()
        count = sizes.batch * sizes.heads * sizes.chunks * sizes.dim * sizes.state
        self._states_at = [slab.take(count, dtype.itemsize) for _ in range(2)]
        self._find = states.bind(2)
        if self.spans > 1:
            self._combine = states.combine(2)
            self._spans_at = [slab.take(states.entries) for _ in range(4)]
            self._sums_at = slab.take(states.sums)
        self.memory, self._alone = slab.size, sizes.chunks == 1 and sizes.states <= 64
        per_group = sizes.heads // sizes.groups
        self._run = load(shape.instance, index).bind(
            (sizes.groups * splits, sizes.chunks, sizes.batch), (shape.threads, 1, 1), shape.shared,
            batch=batch, length=sizes.length, heads=sizes.heads, per_group=per_group,
            groups=sizes.groups, dim=sizes.dim, state=sizes.state, chunks=sizes.chunks,
            splits=splits, per_split=-(-per_group // splits), reverse=int(options.reverse),
            D_type=CODES.get(options.D, 0), D_full=int(options.D_full), **options.fields(),
            **cuda_launch.map_fields(**maps._asdict()))

    def run(self, memory: int, inputs: dict[str, int], results: dict[str, int], start: int,
            grad_last: int, grad_start: int) -> None:
        states, grad_states = (memory + at for at in self._states_at)
        if self._alone and not start and not grad_last:
            states = grad_states = 0  # nothing enters the only chunk or leaves it
        elif self.spans == 1:
            self._find(entries=start, grad_entries=grad_last, states=states,
                       grad_states=grad_states, grad_ends=grad_start, **inputs)
        else:
            ends, grad_ends, entries, grad_entries = (memory + at for at in self._spans_at)
            sums = memory + self._sums_at
            self._find(ends=ends, grad_ends=grad_ends, sums=sums, **inputs)
            self._combine(ends=ends, grad_ends=grad_ends, sums=sums, before=start,
                          grad_before=grad_last, entries=entries, grad_entries=grad_entries,
                          grad_last=grad_start)
            self._find(entries=entries, grad_entries=grad_entries, states=states,
                       grad_states=grad_states, **inputs)
        self._run(states=states, grad_states=grad_states, **inputs, **results)


def _pieces(sizes: Sizes, size: int) -> list[int]:
    """The samples of each piece."""
    each = 2 * sizes.heads * sizes.chunks * sizes.dim * sizes.state * size
    pieces = min(-(-sizes.batch * each // MOST_STATES), sizes.batch)
    return [sizes.batch // pieces + (i < sizes.batch % pieces) for i in range(pieces)]


@cached
def backward_launch(index: int, dtype: torch.dtype, fast: bool, sizes: Sizes, options: Options,
                    *strides: Strides) -> BackwardLaunch:
    """The backward, without a gate. ``strides`` are of x, dy, dt, B, C and of the gradients by x,
    dt, B, C.

    It takes the addresses of x, dy, dt, A, B, C, dx, ddt, head_parts (2, B, chunks, H) and memory;
    of dB and dC or, with ``splits``, of BC_parts (2, splits, B, L, G, N); and, 0 for none, of D,
    D_parts (B, chunks, H, P), bias, start, grad_last, grad_start and seq_idx. Parts are
    fp32.
    """
    maps, counts = _Maps(*strides), _pieces(sizes, dtype.itemsize)
    shape = cuda_launch.backward_shape(index, dtype, fast, sizes)
    splits = head_splits(index, shape.blocks, sizes, counts)
    pieces = {count: _Piece(index, dtype, fast, sizes.batch, sizes._replace(batch=count), options,
                            maps, shape, splits) for count in {*counts}}
    # Bytes from a sample to the next.
    of = {name: strides.b * (options.dt.itemsize if name in ('dt', 'ddt') else dtype.itemsize)
          for name, strides in maps._asdict().items()}
    of_state = 4 * sizes.heads * sizes.dim * sizes.state
    of_parts = dict(head_parts=4 * sizes.chunks * sizes.heads,
                    D_parts=4 * sizes.chunks * sizes.heads * sizes.dim,
                    BC_parts=4 * sizes.length * sizes.groups * sizes.state)

    def launch_backward(x, dy, dt, A, B, C, dx, ddt, head_parts, memory, dB=0, dC=0, BC_parts=0,
                        D=0, D_parts=0, bias=0, start=0, grad_last=0, grad_start=0, seq_idx=0):
        first = 0
        for count in counts:
            def at(address, bytes_):
                return address and address + first * bytes_  # noqa: B023

            inputs = dict(
                x_data=at(x, of['x']), dy_data=at(dy, of['dy']), dt_data=at(dt, of['dt']),
                step_A=A, step_bias=bias, B_data=at(B, of['B']), C_data=at(C, of['C']),
                step_index=at(seq_idx, 4 * sizes.length))
            results = dict(
                dx_data=at(dx, of['dx']), ddt_data=at(ddt, of['ddt']), dB_data=at(dB, of['dB']),
                dC_data=at(dC, of['dC']), BC_parts=at(BC_parts, of_parts['BC_parts']),
                head_parts=at(head_parts, of_parts['head_parts']), D=D,
                D_parts=at(D_parts, of_parts['D_parts']))
            pieces[count].run(memory, inputs, results, at(start, of_state),
                              at(grad_last, of_state), at(grad_start, of_state))
            first += count

    return BackwardLaunch(launch_backward, max(piece.memory for piece in pieces.values()), splits)
