"""The scan with a decay and a weight for each token and head, chunk by chunk, by matrix products.

    S_t = exp(a_t) S_(t-1) + w_t x_t B_t^T        y_t = S_t C_t

with the logarithm of decays a and the weights w, of which Mamba-2 has a = dt A and w = dt, and
RetNet's retention a constant a for each head and w = 1. Inside of a chunk of Q tokens this is
attention with a mask of decays; the state before a chunk comes in by a second product. Chunks go in
blocks, so that what exists at a time is bounded, whatever the length and the batch.

Within a block all is laid out (M, H, G, Q, ...): M samples, H heads (or groups of heads), G chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import e, log2

import torch
import torch.nn.functional as F
from torch import Tensor

#: Numbers of one temporary tensor of a block: those of a CPU stay in its caches.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 26
#: Tokens of a chunk, at most.
_CPU_CHUNK, _GPU_CHUNK = 64, 64


@dataclass(frozen=True)
class Block:
    """Samples and chunks that are calculated together."""

    samples: slice
    tokens: slice
    chunks: int
    chunk_len: int
    reverse: bool

    @property
    def ends(self) -> tuple[int, int]:
        """The indices of a chunk's, or the block's, first and last element in time."""
        return (-1, 0) if self.reverse else (0, -1)

    @property
    def place(self) -> tuple[slice, slice]:
        """Its part of a tensor (B, L, ...)."""
        return self.samples, self.tokens

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, L', H, ...) -> (M, H, G, Q, ...) without gaps, zeros beyond the end."""
        t = t.transpose(1, 2)
        samples, heads, length = t.shape[:3]
        out = torch.empty(samples, heads, self.chunks, self.chunk_len, *t.shape[3:], dtype=dtype,
                          device=t.device)
        flat = out.flatten(2, 3)
        flat[:, :, :length].copy_(t)
        flat[:, :, length:] = 0
        return out

    def join(self, t: Tensor) -> Tensor:
        """(M, H, G, Q, ...) -> (M, L', H, ...), the inverse of :meth:`cut`."""
        length = self.tokens.stop - self.tokens.start
        return t.flatten(2, 3)[:, :, :length].transpose(1, 2)


def make_blocks(x: Tensor, state: int, reverse: bool, chunk_len: int | None = None
                ) -> list[list[Block]]:
    """The blocks of each part of the batch, in the order of time.

    Args:
        x: (B, L, H, P).
        state: N.
        chunk_len: tokens of a chunk; None for the best.
    """
    batch, length, heads, dim = x.shape
    if chunk_len is None:
        longest = _CPU_CHUNK if x.device.type == 'cpu' else _GPU_CHUNK
        chunk_len = -(-length // -(-length // longest))
    chunks = -(-length // chunk_len)
    size = heads * max(chunk_len * chunk_len, chunk_len * dim, chunk_len * state, dim * state)
    fits = max(1, (_CPU_BLOCK if x.device.type == 'cpu' else _GPU_BLOCK) // size)
    span = min(chunks, fits)
    samples = max(1, fits // chunks)
    parts = []
    for i in range(0, batch, samples):
        blocks = []
        for first in range(0, chunks, span):
            count = min(span, chunks - first)
            tokens = slice(first * chunk_len, min(length, (first + count) * chunk_len))
            blocks.append(Block(slice(i, min(batch, i + samples)), tokens, count, chunk_len,
                                reverse))
        parts.append(blocks[::-1] if reverse else blocks)
    return parts


class Decays:
    """The decays of a block.

    Sums of logarithms are fp64 where the device has it: the decay between two tokens is that of a
    difference, which does not lose what strong decays before both of them add to it.

    Attributes:
        mask: (M, H, G, Q, Q), from token (last) to token: 0 for what is not seen.
        into: (M, H, G, Q), from the state before the chunk to a token.
        out: (M, H, G, Q), from a token to the end of the chunk.
        through: (M, H, G), of the state, through the chunk.
    """

    def __init__(self, block: Block, log_decay: Tensor, segments: Tensor | None):
        dtype, (_, last) = log_decay.dtype, block.ends
        # A factor below the smallest number is 0: this keeps sums small.
        least = log2(torch.finfo(dtype).tiny) * 1.25
        terms = block.cut(log_decay[block.place], _sum_dtype(log_decay))
        sums = _cumsum(terms.mul_(log2(e)).clamp_min_(least), block.reverse)
        total = sums[..., last]
        # Powers of 2, which a CPU calculates four times as fast as those of e.
        self.mask = (sums[..., :, None] - sums[..., None, :]).to(dtype)
        self.mask.add_(_unseen(block, self.mask)).exp2_()
        self.into = sums.to(dtype).exp2()
        self.out = (total[..., None] - sums).to(dtype).exp2_()
        self.through = total.to(dtype).exp2()
        if segments is not None:
            self._restart(block, segments)

    def _restart(self, block, segments):
        """Set to 0 what is between segments."""
        _, last = block.ends
        tokens = segments[block.place]
        within = F.pad(tokens, (0, block.chunks * block.chunk_len - tokens.shape[1]))
        if within.shape[1] > tokens.shape[1]:  # The padding goes on with the last segment.
            within[:, tokens.shape[1]:] = tokens[:, -1:]
        within = within.unflatten(1, (block.chunks, block.chunk_len))
        ends = within[..., last]
        edge = block.tokens.stop if block.reverse else block.tokens.start - 1
        is_first = edge in (-1, segments.shape[1])
        before = torch.zeros_like(ends[:, 0]) if is_first else segments[block.samples, edge]
        before = torch.cat([ends[:, 1:], before[:, None]] if block.reverse else
                           [before[:, None], ends[:, :-1]], dim=1)
        self.mask.mul_((within[..., :, None] == within[..., None, :])[:, None])
        self.into.mul_((within == before[..., None])[:, None])
        self.out.mul_((within == ends[..., None])[:, None])
        self.through.mul_((ends == before)[:, None])


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.device.type in ('cpu', 'cuda', 'meta') else t.dtype


def _cumsum(t: Tensor, reverse: bool) -> Tensor:
    """Sums up to and including each element, in the order of time."""
    return t.flip(-1).cumsum(-1).flip(-1) if reverse else t.cumsum(-1)


def _unseen(block: Block, like: Tensor) -> Tensor:
    """(Q, Q): 0 for a token at or before another in time, else minus infinity."""
    full = like.new_full((block.chunk_len, block.chunk_len), -torch.inf)
    return full.tril(-1) if block.reverse else full.triu(1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(M, H, ...) -> (M, groups, H / groups, ...)."""
    return t.unflatten(1, (groups, -1))


def _times_group(per_head: Tensor, per_group: Tensor) -> Tensor:
    """Matrix products of (M, H, G, ., .) with the head's group of (M, groups, G, ., .)."""
    groups = per_group.shape[1]
    return (_by_group(per_head, groups) @ per_group[:, :, None]).flatten(1, 2)


def _over_heads(t: Tensor, groups: int) -> Tensor:
    """The sum over the heads of each group."""
    return t if t.shape[1] == groups else _by_group(t, groups).sum(2)


def _group_times(per_group: Tensor, per_head: Tensor) -> Tensor:
    """Matrix products of each head's group with (M, H, G, ., .)."""
    return (per_group[:, :, None] @ _by_group(per_head, per_group.shape[1])).flatten(1, 2)


def _dot(per_head: Tensor, per_group: Tensor) -> Tensor:
    """Scalar products of (M, H, G, Q, N) with the head's group."""
    groups = per_group.shape[1]
    return (_by_group(per_head, groups) * per_group[:, :, None]).sum(-1).flatten(1, 2)


class _Pass:
    """What forward and backward calculate of a block: its inputs as blocks, and states."""

    def __init__(self, block: Block, x, log_decay, weight, B, C, segments, initial):
        dtype = log_decay.dtype
        self.block, self.groups = block, B.shape[2]
        self.x, self.B, self.C = (block.cut(t[block.place], dtype) for t in (x, B, C))
        self.weight = None if weight is None else block.cut(weight[block.place], dtype)
        self.decays = Decays(block, log_decay, segments)
        driven = self.x * self.weigh(self.decays.out)[..., None]
        ends = _times_group(driven.mT, self.B)
        self.before, self.last = _carry(block, ends, self.decays.through, initial)

    def weigh(self, t: Tensor) -> Tensor:
        """Times the weights of tokens, the last dimension of ``t``."""
        if self.weight is None:
            return t
        return t * (self.weight if t.dim() == self.weight.dim() else self.weight[..., None, :])

    def scores(self) -> Tensor:
        """The mask of decays times the products C B^T of each head's group, (M, H, G, Q, Q)."""
        products = self.C @ self.B.mT
        return (_by_group(self.decays.mask, self.groups) * products[:, :, None]).flatten(1, 2)

    def result(self, scores: Tensor) -> Tensor:
        """y (M, H, G, Q, P) from the scores before weights."""
        y = self.weigh(scores) @ self.x
        return y.addcmul_(self.decays.into[..., None], _group_times(self.C, self.before.mT))


def _carry(block: Block, ends: Tensor, through: Tensor, initial: Tensor | None
           ) -> tuple[Tensor, Tensor]:
    """The states before the chunks, (M, H, G, P, N), and the one after the last.

    Args:
        ends: what the tokens of each chunk leave at its end.
        through: (M, H, G).
        initial: (M, H, P, N), or None for zeros.
    """
    before = torch.empty_like(ends)
    state = torch.zeros_like(ends[:, :, 0]) if initial is None else initial
    for g in range(block.chunks)[::-1] if block.reverse else range(block.chunks):
        before[:, :, g] = state
        state = torch.addcmul(ends[:, :, g], through[:, :, g, None, None], state)
    return before, state


def _carry_back(block: Block, reads: Tensor, through: Tensor, grad_last: Tensor
                ) -> tuple[Tensor, Tensor]:
    """Gradients by the states after the chunks, (M, H, G, P, N), and by the one before the first.

    Args:
        reads: the gradients by the states before the chunks of what the tokens read.
        through: (M, H, G).
        grad_last: (M, H, P, N), by the state after the last chunk.
    """
    after, grad = torch.empty_like(reads), grad_last
    for g in range(block.chunks) if block.reverse else range(block.chunks)[::-1]:
        after[:, :, g] = grad
        grad = torch.addcmul(reads[:, :, g], through[:, :, g, None, None], grad)
    return after, grad


def scan(x: Tensor, log_decay: Tensor, weight: Tensor | None, B: Tensor, C: Tensor,
         initial: Tensor | None, segments: Tensor | None, reverse: bool, write: Callable,
         chunk_len: int | None = None) -> Tensor:
    """Run the scan, block by block.

    Args:
        x: (B, L, H, P).
        log_decay: (B, L, H), the logarithm of decays, in the dtype of the computation.
        weight: (B, L, H), or None for ones.
        B, C: (B, L, G, N).
        initial: (B, H, P, N), or None.
        segments: (B, L), as of ``reference.number_segments``, or None for one.
        write: called with a block and its y (M, L', H, P), which it may change.
        chunk_len: tokens of a chunk; None for the best.

    Returns:
        The final state, (B, H, P, N).
    """
    final = log_decay.new_empty(len(x), *x.shape[2:], B.shape[3])
    for blocks in make_blocks(x, B.shape[3], reverse, chunk_len):
        state = None if initial is None else initial[blocks[0].samples].to(log_decay.dtype)
        for block in blocks:
            run = _Pass(block, x, log_decay, weight, B, C, segments, state)
            write(block, block.join(run.result(run.scores())))
            state = run.last
        final[blocks[0].samples] = state
    return final


def scan_backward(x: Tensor, log_decay: Tensor, weight: Tensor | None, B: Tensor, C: Tensor,
                  initial: Tensor | None, segments: Tensor | None, reverse: bool, read: Callable,
                  grad_final: Tensor | None, write: Callable, wants_y: bool = False,
                  chunk_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`scan`; states are calculated again.

    Args:
        read: called with a block and its y, as ``write`` of ``scan``, but None without
            ``wants_y``; gives the gradient by y, (M, L', H, P).
        grad_final: (B, H, P, N), or None.
        write: called with a block and its gradients by x (M, L', H, P), B and C (M, L', G, N).

    Returns:
        The gradients by ``log_decay`` and ``weight``, (B, L, H), and by the initial state.
    """
    dtype = log_decay.dtype
    grad_decay, grad_weight = (torch.empty_like(
        log_decay, memory_format=torch.contiguous_format) for _ in range(2))
    grad_initial = log_decay.new_empty(len(x), *x.shape[2:], B.shape[3])
    for blocks in make_blocks(x, B.shape[3], reverse, chunk_len):
        samples = blocks[0].samples
        states = [None if initial is None else initial[samples].to(dtype)]
        for block in blocks[:-1]:
            states.append(_Pass(block, x, log_decay, weight, B, C, segments, states[-1]).last)
        grad = torch.zeros_like(grad_initial[samples]) if grad_final is None else \
            grad_final[samples].to(dtype)
        for block in reversed(blocks):
            run = _Pass(block, x, log_decay, weight, B, C, segments, states.pop())
            scores = run.scores()
            y = block.join(run.result(scores)) if wants_y else None
            grad_y = block.cut(read(block, y), dtype)
            *by_inputs, gdecay, gweight, grad = _block_backward(run, scores, grad_y, grad)
            write(block, *map(block.join, by_inputs))
            grad_decay[block.place] = block.join(gdecay)
            grad_weight[block.place] = block.join(gweight)
        grad_initial[samples] = grad
    return grad_decay, grad_weight, grad_initial


def _block_backward(run: _Pass, scores: Tensor, grad_y: Tensor, grad_last: Tensor):
    """Gradients of a block by x, B, C, logarithms of decays, weights and the first state.

    The gradient by a_k is the sum of what goes from before k to k or later. Of pairs in a chunk it
    leaves out what a token adds to its own y, which would cancel but for rounding, and drown the
    rest where decays are strong.
    """
    block, decays, groups = run.block, run.decays, run.groups
    by_state = _times_group((grad_y * decays.into[..., None]).mT, run.C)
    after, grad_initial = _carry_back(block, by_state, decays.through, grad_last)
    through = decays.through * (after * run.before).sum((-2, -1))

    # y = (mask * C B^T * weight) x inside of a chunk.
    by_scores = run.weigh(grad_y @ run.x.mT)
    pairs = by_scores * scores
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    crossing = (pairs.sum(-1) - pairs.sum(-2)).to(_sum_dtype(pairs))
    grad_decay = _cumsum(crossing, not block.reverse).to(pairs.dtype)
    by_products = _over_heads(by_scores.mul_(decays.mask), groups)
    grad_C, grad_B = by_products @ run.B, by_products.mT @ run.C
    driven = scores.mT @ grad_y

    # A token leaves out * weight * x B^T at the end of its chunk.
    by_B = run.x @ after
    leaves = run.weigh(decays.out) * _dot(by_B, run.B)
    grad_B += _over_heads(by_B.mul_(run.weigh(decays.out)[..., None]), groups)
    driven.addcmul_(decays.out[..., None], _group_times(run.B, after.mT))
    # It reads into * S C of the state S before its chunk.
    by_C = grad_y @ run.before
    reads = decays.into * _dot(by_C, run.C)
    grad_C += _over_heads(by_C.mul_(decays.into[..., None]), groups)

    grad_decay += _cumsum(reads, not block.reverse)
    grad_decay += _cumsum(leaves, block.reverse) - leaves
    grad_decay += through[..., None]
    grad_weight = (driven * run.x).sum(-1)
    grad_x = driven if run.weight is None else driven.mul_(run.weight[..., None])
    return grad_x, grad_B, grad_C, grad_decay, grad_weight, grad_initial
