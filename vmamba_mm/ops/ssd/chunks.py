"""The scan with a decay and a weight for each token and head, chunk by chunk, by matrix products.

    S_t = exp(a_t) S_(t-1) + w_t x_t B_t^T        y_t = S_t C_t

with the logarithm of decays a and the weights w, of which Mamba-2 has a = dt A and w = dt, and
RetNet's retention a constant a for each head and w = 1. Inside of a chunk of Q tokens this is
attention with a mask of decays; the state before a chunk comes in by a second product. Chunks go in
blocks, so that what exists at a time is bounded, whatever the length and the batch.

Shapes within a block of M samples: (M, c, Q, H, P) is that of tokens as they lie in memory, in c
chunks of Q, and (M, c, H, Q, P) that by heads. All heads of a group share B and C, so that what
goes through states, (M, c, H, P, N), is one product for a group: of (Q, H/G * P) with (Q, N) and
the like. What stays in a chunk is one for each head, since their masks differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import e, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype

#: Numbers of one temporary tensor of a block, of which there are about ten at a time. On a CPU
#: they stay in its caches.
_CPU_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 24


@dataclass(frozen=True)
class Block:
    """Samples and chunks that are calculated together."""

    samples: slice
    tokens: slice
    chunks: int
    chunk_len: int
    reverse: bool

    @property
    def place(self) -> tuple[slice, slice]:
        """Its part of a tensor (B, L, ...)."""
        return self.samples, self.tokens

    @property
    def time(self) -> range:
        """Its chunks in the order of time."""
        return range(self.chunks)[::-1] if self.reverse else range(self.chunks)

    def all_but(self, omitted: int | None = None) -> slice:
        """All chunks, or all but the first (0) or the last (-1) in time."""
        skips_first = omitted is not None and self.time[omitted] == 0
        skips_last = omitted is not None and not skips_first
        return slice(int(skips_first), self.chunks - int(skips_last))

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, L', ...) -> (M, c, Q, ...), with zeros beyond the end; a view where that will do."""
        size = self.chunks * self.chunk_len
        if t.shape[1] < size:
            out = torch.empty(len(t), size, *t.shape[2:], dtype=dtype, device=t.device)
            out[:, :t.shape[1]] = t
            out[:, t.shape[1]:] = 0
            t = out
        return t.to(dtype).unflatten(1, (self.chunks, self.chunk_len))

    def cut_heads(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, L', H, ...) -> (M, c, H, Q, ...), as :meth:`cut`."""
        return self.cut(t, dtype).transpose(2, 3)

    def put(self, into: Tensor, t: Tensor) -> None:
        """Write (M, c, Q, ...) to its place in (B, L, ...), without the padding."""
        into = into[self.place]
        whole, rest = divmod(into.shape[1], self.chunk_len)
        if whole:
            head = into[:, :into.shape[1] - rest].unflatten(1, (whole, self.chunk_len))
            head.copy_(t[:, :whole])
        if rest:
            into[:, -rest:] = t[:, -1, :rest]


def make_blocks(x: Tensor, state: int, reverse: bool, chunk_len: int | None = None
                ) -> list[list[Block]]:
    """The blocks of each part of the batch, in the order of time.

    Args:
        x: (B, L, H, P).
        state: N.
        chunk_len: tokens of a chunk; None for the best.
    """
    _, length, heads, dim = x.shape
    if chunk_len is None:
        chunk_len = _choose_chunk_len(length, state, x.device.type == 'cpu')
    size = heads * max(chunk_len * chunk_len, chunk_len * dim, chunk_len * state, dim * state)
    return partition(x, chunk_len, size, reverse)


def partition(x: Tensor, chunk_len: int, size: int, reverse: bool = False) -> list[list[Block]]:
    """As :func:`make_blocks`, of chunks whose largest temporary tensor has ``size`` numbers."""
    batch, length = x.shape[:2]
    chunks = -(-length // chunk_len)
    fits = max(1, (_CPU_BLOCK if x.device.type == 'cpu' else _GPU_BLOCK) // size)
    span, samples = min(chunks, fits), max(1, fits // chunks)
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


def _choose_chunk_len(length: int, state: int, is_cpu: bool) -> int:
    """Up to 64 tokens; fewer pay with few states. Even chunks, so that little is padding."""
    chunk_len = -(-length // -(-length // (32 if state <= 16 else 64)))
    # GPUs multiply matrices of half precision by rows of 16 bytes.
    return chunk_len if is_cpu else -(-chunk_len // 8) * 8


# --- decays -------------------------------------------------------------------------------------

class _Decays:
    """The decays of a block.

    Sums of logarithms are fp64 where the device has it: the decay between two tokens is that of a
    difference, which does not lose what strong decays before both of them add to it.

    Attributes:
        into: (M, c, H, Q), from the state before the chunk to a token.
        out: (M, c, H, Q), from a token to the end of the chunk.
        through: (M, c, H), of the state, through the chunk.
    """

    def __init__(self, block: Block, log_decay: Tensor, segments: Tensor | None):
        self._block, self._dtype = block, log_decay.dtype
        # A factor below the smallest number is 0: this keeps sums small.
        least = log2(torch.finfo(self._dtype).tiny) * 1.25
        terms = block.cut_heads(log_decay[block.place], _sum_dtype(log_decay))
        self._sums = _cumsum((terms * log2(e)).clamp_min_(least), block.reverse)
        last = 0 if block.reverse else -1
        total = self._sums[..., last]
        # Powers of 2, which a CPU calculates four times as fast as those of e.
        self.into = self._sums.to(self._dtype).exp2()
        self.out = (total[..., None] - self._sums).to(self._dtype).exp2_()
        self.through = total.to(self._dtype).exp2()
        self._segments = None
        if segments is not None:
            self._segments, before = _segments_of(block, segments, last)
            ends = self._segments[..., last]
            self.into.masked_fill_((self._segments != before[..., None])[:, :, None], 0)
            self.out.masked_fill_((self._segments != ends[..., None])[:, :, None], 0)
            self.through.masked_fill_((ends != before)[:, :, None], 0)

    @cached_property
    def mask(self) -> Tensor:
        """(M, c, H, Q, Q), to a token from a token (last): 0 for what is not seen."""
        sums = self._sums
        mask = sums.new_empty(*sums.shape, sums.shape[-1], dtype=self._dtype)
        torch.sub(sums[..., :, None], sums[..., None, :], out=mask)
        mask.add_(_unseen(self._block, mask)).exp2_()
        if self._segments is not None:
            tokens = self._segments
            mask.masked_fill_((tokens[..., :, None] != tokens[..., None, :])[:, :, None], 0)
        return mask


def _segments_of(block: Block, segments: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """The segments of a block's tokens, (M, c, Q), and those before its chunks, (M, c)."""
    tokens = segments[block.place]
    padding = block.chunks * block.chunk_len - tokens.shape[1]
    if padding:  # It goes on with the last segment.
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, padding)], dim=1)
    tokens = tokens.unflatten(1, (block.chunks, block.chunk_len))
    ends = tokens[..., last]
    edge = block.tokens.stop if block.reverse else block.tokens.start - 1
    is_first = edge in (-1, segments.shape[1])
    before = torch.zeros_like(ends[:, 0]) if is_first else segments[block.samples, edge]
    return tokens, torch.cat([ends[:, 1:], before[:, None]] if block.reverse else
                             [before[:, None], ends[:, :-1]], dim=1)


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.device.type in ('cpu', 'cuda') else t.dtype


def _cumsum(t: Tensor, reverse: bool) -> Tensor:
    """Sums up to and including each element, in the order of time."""
    return t.flip(-1).cumsum(-1).flip(-1) if reverse else t.cumsum(-1)


def _unseen(block: Block, like: Tensor) -> Tensor:
    """(Q, Q): 0 for a token at or before another in time, else minus infinity."""
    full = like.new_full((block.chunk_len, block.chunk_len), -torch.inf)
    return full.tril(-1) if block.reverse else full.triu(1)


def _crossing(pairs: Tensor, reverse: bool) -> Tensor:
    """For each token k, the sum over pairs[t, s] from s before k to t at or after k, in time.

    They are the pairs whose decay has that of k in it. What differences of sums over all t and all
    s would give is the same but for rounding, which drowns it where the decay of k is strong.
    """
    if reverse:
        return pairs.cumsum(-2).triu_(1).sum(-1)
    return F.pad(pairs.cumsum(-1).tril_(-1).sum(-2)[..., :-1], (1, 0))


# --- products -----------------------------------------------------------------------------------

def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of what is multiplied: half precision if all are, on GPUs that sum it in fp32."""
    dtype = tensors[0].dtype
    if (dtype in (torch.float16, torch.bfloat16) and all(t.dtype == dtype for t in tensors)
            and tensors[0].is_cuda and torch.version.hip is None
            and hasattr(torch.ops.aten.bmm, 'dtype')  # from torch 2.8 on
            and torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)):
        return dtype
    return compute_dtype(dtype)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products (M, c, ., ., .), summed and returned in fp32 where they are of half precision."""
    if a.dtype == compute_dtype(a.dtype):
        return a @ b
    if not a.is_cuda:  # as a test of half precision does
        return a.float() @ b.float()
    product = torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out_dtype=torch.float32)
    return product.unflatten(0, a.shape[:3])


# --- a block ------------------------------------------------------------------------------------

def _for_tokens(t: Tensor) -> Tensor:
    """(M, c, H, Q) -> (M, c, Q, H, 1)."""
    return t.transpose(2, 3).unsqueeze(-1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(M, c, Q, H, P) -> (M, c, G, Q, H/G * P)."""
    return t.unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)


def _by_token(t: Tensor, dim: int) -> Tensor:
    """(M, c, G, Q, H/G * P) -> (M, c, Q, H, P)."""
    return t.transpose(2, 3).unflatten(-1, (-1, dim)).flatten(3, 4)


def _carry(order: range, added: Tensor, adding: slice, through: Tensor, first: Tensor | None,
           stored: slice) -> tuple[Tensor, Tensor | None]:
    """Carry states from chunk to chunk, or their gradients in the other direction.

    Args:
        order: of the chunks.
        added: (M, c', H, P, N), what the chunks of ``adding`` add.
        through: (M, c, H), by which a state is multiplied in a chunk.
        first: (M, H, P, N), or None for zeros.
        stored: the chunks that are not the first of ``order``, and that if ``first`` is given.

    Returns:
        The states with which the chunks of ``stored`` begin, and the one after the last, None if
        that chunk is not in ``adding``.
    """
    chunks = range(len(order))
    states = added.new_empty(len(added), len(chunks[stored]), *added.shape[2:])
    places = dict(zip(chunks[stored], states.unbind(1), strict=True))
    terms = dict(zip(chunks[adding], added.unbind(1), strict=True))
    state = None if first is None else places[order[0]].copy_(first)
    for i, following in zip(order, (*order[1:], None), strict=True):
        if i not in terms:
            return states, None
        place = places.get(following)
        if state is not None:
            state = torch.addcmul(terms[i], through[:, i, :, None, None], state, out=place)
        else:
            state = terms[i] if place is None else place.copy_(terms[i])
    return states, state


class _Pass:
    """What forward and backward calculate of a block: its inputs, decays and states.

    States are of chunks that are ``entered`` by one, and of those that have ``left`` one to the
    next: all but the first and the last, unless a state comes in and goes out.

    Args:
        initial: (M, H, P, N), the state before the block, or None for zeros.
        needs_last: whether the state after it is asked for, as ``last``.
    """

    def __init__(self, block: Block, x: Tensor, log_decay: Tensor, weight: Tensor | None, B: Tensor,
                 C: Tensor, segments: Tensor | None, initial: Tensor | None, needs_last: bool):
        dtype, place = log_decay.dtype, block.place
        self.block, self.groups, self.shape = block, B.shape[2], (*x.shape[2:], B.shape[3])
        self.operand = operand_dtype(x, B, C)
        self.x = block.cut(x[place], dtype)
        self.B, self.C = (block.cut_heads(t[place], self.operand).contiguous() for t in (B, C))
        self.weight = None if weight is None else block.cut_heads(weight[place], dtype)
        self.decays = _Decays(block, log_decay, segments)
        self.entered = block.all_but(0) if initial is None else block.all_but()
        self.left = block.all_but() if needs_last else block.all_but(-1)
        #: What is left of weight x at the end of the chunk, (M, c', Q, H, P).
        out = self.decays.out if weight is None else self.decays.out * self.weight
        leaving = self.x[:, self.left] * _for_tokens(out[:, self.left])
        self.leaving = leaving.to(self.operand)
        self.before, self.last = _carry(
            block.time, self._states(self.leaving, self.B[:, self.left]), self.left,
            self.decays.through, initial, self.entered)

    @cached_property
    def driving(self) -> Tensor:
        """weight x, (M, c, H, Q, P)."""
        heads = self.x.transpose(2, 3)
        if self.weight is None:
            return self._lay_out(heads)
        return torch.mul(heads, self.weight[..., None],
                         out=heads.new_empty(heads.shape, dtype=self.operand))

    def _lay_out(self, t: Tensor) -> Tensor:
        """A copy without gaps, to multiply with."""
        return torch.empty(t.shape, dtype=self.operand, device=t.device).copy_(t)

    def _states(self, per_head: Tensor, per_group: Tensor) -> Tensor:
        """The sums over tokens of (M, c, Q, H, P) times (M, c, G, Q, N): (M, c, H, P, N)."""
        sums = _multiply(_by_group(per_head, self.groups).mT, per_group)
        return sums.view(*sums.shape[:2], *self.shape)

    def _read(self, states: Tensor, per_group: Tensor) -> Tensor:
        """The products over N of states (M, c, H, P, N) with (M, c, G, Q, N): (M, c, Q, H, P)."""
        return _by_token(_multiply(per_group, self._grouped(states).mT), self.shape[1])

    def _grouped(self, states: Tensor) -> Tensor:
        """(M, c, H, P, N) -> (M, c, G, H/G * P, N), to multiply with."""
        return states.to(self.operand).unflatten(2, (self.groups, -1)).flatten(3, 4)

    def scores(self) -> Tensor:
        """The mask of decays times the products C B^T of each head's group, (M, c, H, Q, Q)."""
        mask = self.decays.mask.unflatten(2, (self.groups, -1))
        return (mask * _multiply(self.C, self.B.mT).unsqueeze(3)).flatten(2, 3)

    def entering(self) -> Tensor:
        """S C of the states S before chunks, without decay: (M, c', Q, H, P)."""
        return self._read(self.before, self.C[:, self.entered])

    def result(self, scores: Tensor, entering: Tensor) -> Tensor:
        """y, (M, c, Q, H, P)."""
        y = _multiply(scores.to(self.operand), self.driving).transpose(2, 3)
        y[:, self.entered].addcmul_(_for_tokens(self.decays.into[:, self.entered]), entering)
        return y

    def backward(self, scores: Tensor, entering: Tensor, grad_y: Tensor, grad_last: Tensor | None
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients from that by y, (M, c, Q, H, P), and by the last state.

        Returns:
            By x (M, c, Q, H, P), B and C (M, c, Q, G, N), logarithms of decays and weights
            (M, c, Q, H), and the state before the block.
        """
        decays, entered, left = self.decays, self.entered, self.left
        heads = self._lay_out(grad_y.transpose(2, 3))

        # y = (mask * C B^T) weight x inside of a chunk.
        by_scores = _multiply(heads, self.driving.mT)
        grad_decay = _crossing(by_scores * scores, self.block.reverse)
        by_products = by_scores.mul_(decays.mask).unflatten(2, (self.groups, -1)).sum(3).to(
            self.operand)
        grad_C, grad_B = _multiply(by_products, self.B), _multiply(by_products.mT, self.C)
        grad_x = _multiply(scores.to(self.operand).mT, heads).transpose(2, 3)

        # A token reads into * S C of the state S before its chunk.
        read = (grad_y[:, entered] * _for_tokens(decays.into[:, entered])).to(self.operand)
        by_before = self._states(read, self.C[:, entered])
        grad_C[:, entered] += _multiply(_by_group(read, self.groups), self._grouped(self.before))
        reads = (read * entering).sum(-1).transpose(2, 3)
        grad_decay[:, entered] += _cumsum(reads, not self.block.reverse)

        # It leaves out * weight * x B^T at the end of its chunk.
        after, grad_initial = _carry(self.block.time[::-1], by_before, entered, decays.through,
                                     grad_last, left)
        grad_B[:, left] += _multiply(_by_group(self.leaving, self.groups), self._grouped(after))
        by_leaving = self._read(after, self.B[:, left])
        grad_x[:, left].addcmul_(_for_tokens(decays.out[:, left]), by_leaving)
        leaves = (self.leaving * by_leaving).sum(-1).transpose(2, 3)
        grad_decay[:, left] += _cumsum(leaves, self.block.reverse) - leaves

        # And a state goes through a chunk.
        both = slice(max(entered.start, left.start), min(entered.stop, left.stop))
        through = self.before[:, _within(both, entered)] * after[:, _within(both, left)]
        grad_decay[:, both] += (through.sum((-2, -1)) * decays.through[:, both])[..., None]

        grad_weight = (grad_x * self.x).sum(-1)
        if self.weight is not None:
            grad_x = grad_x.mul_(_for_tokens(self.weight))
        return (grad_x, grad_B.transpose(2, 3), grad_C.transpose(2, 3), grad_decay.transpose(2, 3),
                grad_weight, grad_initial)


def _within(part: slice, whole: slice) -> slice:
    """The place of a part in what ``whole`` has cut out."""
    return slice(part.start - whole.start, max(part.stop, part.start) - whole.start)


# --- the scan -----------------------------------------------------------------------------------

def scan(x: Tensor, log_decay: Tensor, weight: Tensor | None, B: Tensor, C: Tensor,
         initial: Tensor | None, segments: Tensor | None, reverse: bool, needs_final: bool,
         write: Callable, chunk_len: int | None = None) -> Tensor | None:
    """Run the scan, block by block.

    Args:
        x: (B, L, H, P).
        log_decay: (B, L, H), the logarithm of decays, in the dtype of the computation.
        weight: (B, L, H), or None for ones.
        B, C: (B, L, G, N).
        initial: (B, H, P, N), or None.
        segments: (B, L), as of ``reference.number_segments``, or None for one.
        needs_final: whether the final state is asked for.
        write: called with a block and its x and y, (M, c, Q, H, P). It may change y.
        chunk_len: tokens of a chunk; None for the best.

    Returns:
        The final state, (B, H, P, N), or None.
    """
    states = len(x), *x.shape[2:], B.shape[3]
    final = log_decay.new_empty(states) if needs_final else None
    for blocks in make_blocks(x, B.shape[3], reverse, chunk_len):
        state = None if initial is None else initial[blocks[0].samples].to(log_decay.dtype)
        for block in blocks:
            run = _Pass(block, x, log_decay, weight, B, C, segments, state,
                        needs_final or block is not blocks[-1])
            write(block, run.x, run.result(run.scores(), run.entering()))
            state = run.last
        if needs_final:
            final[blocks[0].samples] = state
    return final


def scan_backward(x: Tensor, log_decay: Tensor, weight: Tensor | None, B: Tensor, C: Tensor,
                  initial: Tensor | None, segments: Tensor | None, reverse: bool,
                  grad_final: Tensor | None, read: Callable, write: Callable, needs_y: bool = False,
                  chunk_len: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`scan`; states are calculated again.

    Args:
        grad_final: (B, H, P, N), or None.
        read: called as ``write`` of ``scan``, but with None for y unless ``needs_y``; gives the
            gradient by y.
        write: called with a block, its x, and the gradients by x (M, c, Q, H, P), B and C
            (M, c, Q, G, N). It may change them.

    Returns:
        The gradients by ``log_decay`` and ``weight``, (B, L, H), and by the initial state.
    """
    dtype, inputs = log_decay.dtype, (x, log_decay, weight, B, C, segments)
    grad_decay, grad_weight = (log_decay.new_empty(log_decay.shape) for _ in range(2))
    grad_initial = None if initial is None else initial.new_empty(initial.shape)
    for blocks in make_blocks(x, B.shape[3], reverse, chunk_len):
        samples = blocks[0].samples
        states = [None if initial is None else initial[samples].to(dtype)]
        for block in blocks[:-1]:
            states.append(_Pass(block, *inputs, states[-1], True).last)
        grad = None if grad_final is None else grad_final[samples].to(dtype)
        for block in reversed(blocks):
            run = _Pass(block, *inputs, states.pop(), grad is not None)
            scores, entering = run.scores(), run.entering()
            grad_y = read(block, run.x, run.result(scores, entering) if needs_y else None)
            gx, gB, gC, gdecay, gweight, grad = run.backward(scores, entering, grad_y, grad)
            write(block, run.x, gx, gB, gC)
            block.put(grad_decay, gdecay)
            block.put(grad_weight, gweight)
        if initial is not None:
            grad_initial[samples] = grad
    return grad_decay, grad_weight, grad_initial
