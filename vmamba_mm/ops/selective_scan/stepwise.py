"""The selective scan step by step, in plain PyTorch: exact, for any device.

All states of a step are one tensor (M, N, D) of M samples, N numbers a channel and D channels, and
what they need is calculated for some steps at once: decays and drives before, what is read of the
states after. A step itself is one call of PyTorch. With many states, N = 16 as in Mamba, this is
two to four times as fast as :mod:`.chunks`, which needs fewer calls and more passes over memory.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import e, log2

import torch
from torch import Tensor

#: Elements of one (M, T, N, D) tensor, on a CPU for each thread: the forward uses two of them at a
#: time, the backward three, which should stay in the last-level cache. On other devices calls are
#: what takes time.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 19, 1 << 25
#: Elements of one step (M, N, D) that a call is worth, on a CPU for each thread.
_STEP = 1 << 15


def arrange(x_BDL: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, D, L) -> contiguous (M, L, D) in ``dtype``."""
    return x_BDL.transpose(1, 2).to(dtype).contiguous()


def sequence(x_BLD: Tensor, length: int) -> Tensor:
    """The reverse of :func:`arrange`, as a view."""
    return x_BLD.transpose(1, 2)


def still(delta: Tensor, length: int) -> Tensor:
    """``delta``, for nothing is padded."""
    return delta


def batch_blocks(batch: int, size: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch: few samples of ``size`` = N * D states, so that blocks of steps of
    them fit into the cache of a CPU, but enough for a call to be worth it; the batch elsewhere."""
    if device.type == 'cpu':
        few = max(1, _STEP * torch.get_num_threads() // size)
        return (slice(i, i + few) for i in range(0, batch, few))
    return iter([slice(0, batch)])


def _time_blocks(length: int, width: int, device: torch.device, reverse: bool) -> list[slice]:
    """Slices of positions in the order of time, whose steps have ``width`` states each."""
    budget = _BLOCK * torch.get_num_threads() if device.type == 'cpu' else _BLOCK_ELSEWHERE
    steps = max(1, budget // max(1, width))
    blocks = [slice(i, min(i + steps, length)) for i in range(0, length, steps)]
    return blocks[::-1] if reverse else blocks


class _Steps:
    """Some samples of a scan: what all of its blocks share.

    Args:
        u, delta: (M, L, D).
        A_ND: (N, D).
        B: (M, L, N).
        initial: (M, D, N), or None for zeros.
        buffers: tensors for a block of states that will be needed.
    """

    def __init__(self, u, delta, A_ND, B, reverse, initial, buffers):
        samples, length, _ = u.shape
        self.drive, self.delta, self.B, self.reverse = delta * u, delta, B, reverse
        self.A_log2 = A_ND * log2(e)
        self.state = (u.new_zeros(samples, *A_ND.shape) if initial is None
                      else initial.mT.contiguous())
        self.blocks = _time_blocks(length, samples * A_ND.numel(), u.device, reverse)
        steps = max(block.stop - block.start for block in self.blocks)
        self.buffers = u.new_empty(buffers, samples, steps, *A_ND.shape).unbind(0)

    def ends(self, block: slice) -> tuple[int, int]:
        """The first and the last step in time."""
        ends = 0, block.stop - block.start - 1
        return ends[::-1] if self.reverse else ends

    def advance(self, block: slice) -> tuple[Tensor, Tensor]:
        """Decays and states (M, T, N, D) of a block; ``state`` becomes that after it."""
        size = block.stop - block.start
        a, h = (t[:, :size] for t in self.buffers[:2])
        torch.mul(self.delta[:, block, None], self.A_log2, out=a).exp2_()
        torch.mul(self.B[:, block, :, None], self.drive[:, block, None], out=h)
        a_t, h_t = a.unbind(1), h.unbind(1)
        state = self.state
        for t in reversed(range(size)) if self.reverse else range(size):
            state = h_t[t].addcmul_(a_t[t], state)
        self.state = state.clone()
        return a, h


def _read(states: Tensor, weights: Tensor) -> Tensor:
    """(M, T, N, D), (M, T, N) -> (M, T, D): sums over N with weights."""
    return (weights[:, :, None] @ states)[:, :, 0]


def _inner(states: Tensor, x: Tensor) -> Tensor:
    """(M, T, N, D), (M, T, D) -> (M, T, N): sums over D with weights."""
    return (x[:, :, None] @ states.mT)[:, :, 0]


def scan(u, delta, A, B, C, reverse: bool, out: Tensor, initial: Tensor | None = None,
         final: Tensor | None = None) -> None:
    """Add one direction's scan to ``out``: y_t = <C_t, h_t>, without the skip.

    Args:
        u, delta, out: (M, L, D).
        A: (D, N).
        B, C: (M, L, N).
        initial: (M, D, N), the state before the first step, or None for zeros.
        final: (M, D, N), filled with the state after the last step.
    """
    A_ND = A.T.contiguous()
    for some in batch_blocks(len(u), A.numel(), u.device):
        steps = _Steps(u[some], delta[some], A_ND, B[some], reverse,
                       None if initial is None else initial[some], 2)
        for block in steps.blocks:
            _, h = steps.advance(block)
            out[some, block] += _read(h, C[some, block])
        if final is not None:
            final[some] = steps.state.mT


def scan_backward(grad_y, u, delta, A, B, C, reverse: bool, initial: Tensor | None = None,
                  grad_final: Tensor | None = None, out: Tensor | None = None,
                  grad_initial: Tensor | None = None):
    """Gradients of :func:`scan` by u, delta, A, B, C; states are computed again.

    ``grad_initial``, where given, is filled with the gradient by the first state. The result of the
    forward is added to ``out``, where given.
    """
    A_ND = A.T.contiguous()
    grad_A = torch.zeros_like(A_ND)
    grads = [u.new_empty(t.shape) for t in (u, delta, B, C)]
    for some in batch_blocks(len(u), A.numel(), u.device):
        def pick(t):
            return None if t is None else t[some]  # noqa: B023

        grad_A += _scan_backward(*map(pick, (grad_y, u, delta)), A_ND, *map(pick, (B, C)), reverse,
                                 *map(pick, (initial, grad_final, out, grad_initial, *grads)))
    grad_u, grad_delta, grad_B, grad_C = grads
    return grad_u, grad_delta, grad_A.T, grad_B, grad_C


def _scan_backward(grad_y, u, delta, A_ND, B, C, reverse, initial, grad_final, out, grad_initial,
                   grad_u, grad_delta, grad_B, grad_C) -> Tensor:
    """Fill or add to the tensors given; the gradient by A is returned."""
    steps = _Steps(u, delta, A_ND, B, reverse, initial, 3)
    before = [steps.state]
    for block in steps.blocks[:-1]:
        steps.advance(block)
        before.append(steps.state)
    grad_A = torch.zeros_like(A_ND)
    # The gradient by the state after the block, from what follows.
    carry = torch.zeros_like(steps.state) if grad_final is None else grad_final.mT.contiguous()
    for block, state in zip(reversed(steps.blocks), reversed(before), strict=True):
        steps.state = state
        a, h = steps.advance(block)
        gy, C_t, size = grad_y[:, block], C[:, block], block.stop - block.start
        if out is not None:
            out[:, block] += _read(h, C_t)
        grad_C[:, block] = _inner(h, gy)

        g = torch.mul(C_t[..., None], gy[:, :, None], out=steps.buffers[2][:, :size])
        first, last = steps.ends(block)
        a_t, g_t = a.unbind(1), g.unbind(1)
        g_t[last].add_(carry)
        for after, now in pairwise(range(size) if reverse else reversed(range(size))):
            g_t[now].addcmul_(a_t[after], g_t[after])
        grad_B[:, block] = _inner(g, steps.drive[:, block])
        grad_u[:, block] = _read(g, B[:, block])  # by the drive, so far

        grad_before = a.mul_(g)
        carry = grad_before[:, first].clone()
        now, previous = slice(1, None), slice(None, -1)
        if reverse:
            now, previous = previous, now
        grad_exponent = grad_before
        grad_exponent[:, now].mul_(h[:, previous])
        grad_exponent[:, first].mul_(state)
        torch.sum(torch.mul(grad_exponent, A_ND, out=h), 2, out=grad_delta[:, block])
        grad_A += grad_exponent.mul_(delta[:, block, None]).sum((0, 1))
    if grad_initial is not None:
        grad_initial.copy_(carry.mT)
    grad_delta.addcmul_(grad_u, u)
    grad_u.mul_(delta)
    return grad_A
