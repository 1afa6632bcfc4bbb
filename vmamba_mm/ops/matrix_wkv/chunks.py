"""What the chunked forms of ``wkv6`` and ``wkv7`` share: decays, scores, states, blocks.

The decay is one for each channel of keys, so that what is left at token t of token s is a vector,
and scores inside of a chunk are sums over channels of ``query_t decay_ts key_s``. A product of two
factors, exp(L_t) and exp(-L_s) of the sums L of logarithms, would be one matrix product, but the
second one overflows where decays are strong. Here the decays of all pairs of tokens in a chunk
exist, as (Q, Q, N), with nothing above 1, and chunks are short. Between chunks there is a state.
Chunks go in blocks (:mod:`vmamba_mm.ops.ssd.chunks`), so that what exists at a time is bounded,
whatever the length and the batch; the backward calculates it again, from a state for each block.

Within a block, tensors are (M, c, H, Q, ...): samples, chunks, heads, tokens of a chunk.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from math import e, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.ssd.chunks import Block, partition

#: Tokens of a chunk. The work for the pairs of a chunk grows with it, that for states falls.
_CHUNK_LEN = 16


class Decays:
    """The decays of a block, from ``w`` (B, T, H, N): a token's is exp(-exp(w)).

    Sums of logarithms are fp64 where the device has it, since the decay between two tokens is that
    of a difference.

    Attributes:
        log: (M, c, H, Q, N), the natural logarithm of each token's decay, 0 beyond the end.
        own: its exponential.
        before: from the state before the chunk to a token, without the token's own decay.
        into: the same with it.
        out: from a token, without its own decay, to the end of the chunk.
        through: (M, c, H, N), through the chunk.
    """

    def __init__(self, block: Block, w: Tensor):
        self._dtype = dtype = compute_dtype(w.dtype)
        wide = torch.float64 if w.device.type in ('cpu', 'cuda', 'meta') else dtype
        # A factor below the smallest number is 0: this keeps sums small.
        least = log2(torch.finfo(dtype).tiny) * 1.25
        logs = (-w[block.place].to(dtype).exp() * log2(e)).clamp_min(least)
        logs = block.cut_heads(logs, wide)
        self._sums = logs.cumsum(-2)
        self._sums_before = self._sums - logs
        total = self._sums[..., -1:, :]
        self.log = (logs / log2(e)).to(dtype)
        # Powers of 2, which a CPU calculates faster than those of e.
        self.own, self.before, self.into, self.out, through = (
            t.to(dtype).exp2() for t in (
                logs, self._sums_before, self._sums, total - self._sums, total))
        self.through = through.squeeze(-2)

    @cached_property
    def pairs(self) -> Tensor:
        """(M, c, H, Q, Q, N), to a token from an earlier one (next to last), 0 for others; without
        the decays of both."""
        sums = self._sums
        size = sums.shape[-2]
        pairs = sums.new_empty(*sums.shape[:-1], *sums.shape[-2:], dtype=self._dtype)
        torch.sub(self._sums_before[..., :, None, :], sums[..., None, :, :], out=pairs)
        unseen = pairs.new_full((size, size), -torch.inf).triu()
        return pairs.add_(unseen[..., None]).exp2_()

    def scores(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        """(M, c, H, Q, Q) of each query (M, c, H, Q, N) with each key: 0 but for earlier tokens."""
        stacked = torch.stack(list(queries), dim=-1)
        found = [((self.pairs * key[..., None, :, :]) @ stacked).unbind(-1) for key in keys]
        return [list(of_query) for of_query in zip(*found, strict=True)]

    def scores_backward(self, grads: Sequence[Sequence[Tensor]], queries: Sequence[Tensor],
                        keys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients by queries, keys and the logarithms of decays, from those by the scores."""
        by_queries, by_keys, crossing = 0, [], 0
        for i, key in enumerate(keys):
            by_scores = torch.stack([of_query[i] for of_query in grads], dim=-1)
            weighted = self.pairs * key[..., None, :, :]
            by_queries = by_queries + by_scores.mT @ weighted  # (M, c, H, Q, queries, N)
            values = by_scores @ torch.stack(list(queries), dim=-2)
            by_keys.append((self.pairs * values).sum(-3))
            crossing = crossing + weighted.mul_(values)
        return list(by_queries.unbind(-2)), by_keys, _crossing(crossing)

    def to_w(self, grad: Tensor) -> Tensor:
        """The gradient by w from that by the logarithms of decays."""
        return grad * self.log


def _crossing(pairs: Tensor) -> Tensor:
    """For each token k, the sum over pairs[t, s] of (..., Q, Q, N) from s before k to t after k.

    They are the pairs whose decay has that of k in it. Differences of sums over all t and all s
    would be drowned by rounding where the decay of k is strong.
    """
    size = pairs.shape[-2]
    seen = pairs.new_ones(size, size).tril_(-2)[..., None]
    return F.pad(pairs.cumsum(-2).mul_(seen).sum(-3), (0, 0, 1, 0))[..., :-1, :]


def sum_until(t: Tensor) -> Tensor:
    """For each token of (..., Q, N), the sum over those before it."""
    return F.pad(t[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def sum_from(t: Tensor) -> Tensor:
    """For each token of (..., Q, N), the sum over it and those after it."""
    return t.flip(-2).cumsum(-2).flip(-2)


def sum_after(t: Tensor) -> Tensor:
    """For each token of (..., Q, N), the sum over those after it."""
    return F.pad(sum_from(t)[..., 1:, :], (0, 0, 0, 1))


def carry(order: range, first: Tensor, through: Tensor, added: Tensor, read: Tensor | None = None,
          written: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Carry states from chunk to chunk, or their gradients in the other direction.

    ``S' = through S + written^T read S + added``, the middle term where there are such.

    Args:
        order: of the chunks.
        first: (M, H, N, P).
        through: (M, c, H, N).
        added: (M, c, H, N, P).
        read, written: (M, c, H, Q, N).

    Returns:
        The state with which each chunk begins, (M, c, H, N, P), and the one after the last.
    """
    states, state = torch.empty_like(added), first
    for i in order:
        states[:, i] = state
        following = torch.addcmul(added[:, i], through[:, i, :, :, None], state)
        if read is not None:
            following += written[:, i].mT @ (read[:, i] @ state)
        state = following
    return states, state


# --- blocks -------------------------------------------------------------------------------------

def _blocks(r: Tensor, v: Tensor, chunk_len: int | None) -> list[list[Block]]:
    _, length, heads, size = r.shape
    if chunk_len is None:
        chunk_len = -(-length // -(-length // _CHUNK_LEN))
    return partition(r, chunk_len, heads * size * max(chunk_len ** 2, v.shape[3]))


def _first_state(initial, r, v, samples, dtype):
    if initial is not None:
        return initial[samples].to(dtype)
    return r.new_zeros(len(r[samples]), *r.shape[2:], v.shape[3], dtype=dtype)


def scan(make: Callable, r: Tensor, v: Tensor, initial: Tensor | None, needs_final: bool,
         chunk_len: int | None = None) -> tuple[Tensor, Tensor]:
    """Run an op, block by block.

    Args:
        make: from a block and the state before it, (M, H, N, P), to its pass, which has ``result``
            (), (M, c, H, Q, P), and the state after the block, ``last``.

    Returns:
        y (B, T, H, P) and the final state, empty unless it is needed.
    """
    dtype = compute_dtype(r.dtype)
    out = torch.empty(v.shape, dtype=r.dtype, device=r.device)
    final = r.new_empty((len(r), *r.shape[2:], v.shape[3]) if needs_final else 0, dtype=dtype)
    for blocks in _blocks(r, v, chunk_len):
        samples = blocks[0].samples
        state = _first_state(initial, r, v, samples, dtype)
        for block in blocks:
            run = make(block, state)
            block.put(out, run.result().transpose(2, 3))
            state = run.last
        if needs_final:
            final[samples] = state
    return out, final


def scan_backward(make: Callable, r: Tensor, v: Tensor, tokens: Sequence[Tensor],
                  initial: Tensor | None, grad_y: Tensor | None, grad_final: Tensor | None,
                  chunk_len: int | None = None) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Gradients of :func:`scan`; states are calculated again.

    Args:
        make: as there, of passes that also have ``backward(grad_y, grad_last)``, which returns the
            gradients by ``tokens``, (M, c, H, Q, ...), by the parameter, a number or (H, N), and by
            the state before the block.
        tokens: the inputs (B, T, H, ...) that have gradients.

    Returns:
        The gradients by ``tokens``, by the parameter, and by the initial state or None.
    """
    dtype = compute_dtype(r.dtype)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tokens]
    grad_initial = None if initial is None else torch.empty(
        initial.shape, dtype=initial.dtype, device=initial.device)
    if grad_y is None:
        grad_y = torch.zeros(v.shape, dtype=dtype, device=v.device)
    of_parameter = r.new_zeros((), dtype=dtype)
    for blocks in _blocks(r, v, chunk_len):
        samples = blocks[0].samples
        states = [_first_state(initial, r, v, samples, dtype)]
        for block in blocks[:-1]:
            states.append(make(block, states[-1]).last)
        grad = _first_state(grad_final, r, v, samples, dtype)
        for block in reversed(blocks):
            gy = block.cut_heads(grad_y[block.place], dtype)
            of_tokens, more, grad = make(block, states.pop()).backward(gy, grad)
            of_parameter = of_parameter + more
            for into, found in zip(grads, of_tokens, strict=True):
                block.put(into, found.transpose(2, 3))
        if initial is not None:
            grad_initial[samples] = grad.to(initial.dtype)
    return grads, of_parameter, grad_initial
