"""The selective scan without a loop over L, in plain PyTorch: exact, for any device.

The sequence is cut into G chunks of T steps and laid out time first, (T, G, M, D) with M samples
and D channels, so that one PyTorch call advances every chunk, sample and channel by a step. The
chunks start from a zero state; what enters a chunk from the one before is carried on afterwards
through the chunk's own decay. T + G steps, about 2 sqrt(L), take the place of L.

The state index n is the outer loop: nothing of size L*D*N ever exists.
"""

from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def to_chunks(x_BGTD: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, G, T, D) -> contiguous (T, G, M, D): one copy, whatever the strides."""
    m, g, t, d = x_BGTD.shape
    out = torch.empty(t, g, m, d, dtype=dtype, device=x_BGTD.device)
    return out.copy_(x_BGTD.permute(2, 1, 0, 3))


def chunk_sequence(x_BLD: Tensor) -> Tensor:
    """(M, L, D) -> (M, G, T, D) with T about sqrt(L), padded with zeros at the end.

    A zero in u, B and C drives nothing and is read by nobody, so padding changes no value.
    """
    length = x_BLD.shape[1]
    steps = isqrt(length - 1) + 1
    chunks = -(-length // steps)
    x_BLD = F.pad(x_BLD, (0, 0, 0, chunks * steps - length))
    return x_BLD.unflatten(1, (chunks, steps))


def linear_scan_(a: Tensor, h: Tensor, reverse: bool) -> None:
    """Calculate h_t <- h_t + a_t h_{t-1} in place, along the whole sequence.

    ``a`` ends as the product of the decays since its chunk began.

    Args:
        a, h: contiguous (T, G, M, D); the sequence runs through chunk 0, then chunk 1, ...
        reverse: run from the last step of the last chunk to the first.
    """
    steps, chunks = a.shape[:2]
    time = range(steps)[::-1] if reverse else range(steps)
    a_t, h_t = a.unbind(0), h.unbind(0)
    for previous, now in pairwise(time):
        h_t[now].addcmul_(a_t[now], h_t[previous])
        a_t[now].mul_(a_t[previous])
    if chunks == 1:
        return
    carry = torch.zeros_like(h_t[0])
    carry_g, end_g, decay_g = carry.unbind(0), h_t[time[-1]].unbind(0), a_t[time[-1]].unbind(0)
    for previous, now in pairwise(range(chunks)[::-1] if reverse else range(chunks)):
        torch.addcmul(end_g[previous], decay_g[previous], carry_g[previous], out=carry_g[now])
    h.addcmul_(a, carry)


def _previous(x: Tensor, reverse: bool) -> Tensor:
    """x shifted by one step along the sequence: what the step before held, 0 at the start."""
    out = torch.empty_like(x)
    if reverse:
        out[:-1], out[-1, :-1], out[-1, -1] = x[1:], x[0, 1:], 0
    else:
        out[1:], out[0, 1:], out[0, 0] = x[:-1], x[-1, :-1], 0
    return out


def arrange(x_BDL: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, D, L) -> (T, G, M, D) in ``dtype``."""
    return to_chunks(chunk_sequence(x_BDL.transpose(1, 2)), dtype)


def sequence(x_TGBD: Tensor, length: int) -> Tensor:
    """(T, G, M, D) -> (M, D, L), the padding dropped."""
    return x_TGBD.permute(2, 3, 1, 0).flatten(2)[..., :length]


def still(delta_TGBD: Tensor, length: int) -> Tensor:
    """``delta`` with steps of 0 in the padding, which leave a state as it is."""
    steps, chunks = delta_TGBD.shape[:2]
    delta_TGBD[length - (chunks - 1) * steps:, -1] = 0
    return delta_TGBD


def _ends(chunks: int, steps: int, reverse: bool):
    """(t, g) of the first and of the last position in time."""
    ends = (0, 0), (steps - 1, chunks - 1)
    return ends[::-1] if reverse else ends


def scan(u, delta, A, B, C, reverse: bool, out: Tensor, initial: Tensor | None = None,
                final: Tensor | None = None) -> None:
    """Add one direction's scan to ``out``: y_t = <C_t, h_t>, without the skip.

    Args:
        u, delta, out: (T, G, M, D).
        A: (D, N).
        B, C: (T, G, M, N).
        initial: (M, D, N), the state before the first step, or None for zeros.
        final: (M, D, N), filled with the state after the last step. Where chunks are padded,
            ``delta`` must be 0 in the padding.
    """
    drive = delta * u
    first, last = _ends(u.shape[1], u.shape[0], reverse)
    for n in range(A.shape[1]):
        decay = torch.mul(delta, A[:, n]).exp_()
        h = drive * B[..., n, None]
        if initial is not None:
            h[first].addcmul_(decay[first], initial[..., n])
        linear_scan_(decay, h, reverse)
        out.addcmul_(h, C[..., n, None])
        if final is not None:
            final[..., n] = h[last]


def scan_backward(grad_y, u, delta, A, B, C, reverse: bool, initial: Tensor | None = None,
                         grad_final: Tensor | None = None, out: Tensor | None = None,
                         grad_initial: Tensor | None = None):
    """Gradients of :func:`scan` by u, delta, A, B, C; states are computed again.

    ``grad_initial``, where given, is filled with the gradient by the first state. The result of the
    forward is added to ``out``, where given.
    """
    drive = delta * u
    grad_drive, grad_delta = torch.zeros_like(u), torch.zeros_like(u)
    grad_A = torch.empty_like(A)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    first, last = _ends(u.shape[1], u.shape[0], reverse)
    for n in range(A.shape[1]):
        A_n, B_n, C_n = A[:, n], B[..., n, None], C[..., n, None]
        decay = torch.mul(delta, A_n).exp_()
        h = drive * B_n
        if initial is not None:
            h[first].addcmul_(decay[first], initial[..., n])
        linear_scan_(decay.clone(), h, reverse)
        grad_C[..., n] = (grad_y * h).sum(-1)
        if out is not None:
            out.addcmul_(h, C_n)

        g = grad_y * C_n
        if grad_final is not None:
            g[last].add_(grad_final[..., n])
        linear_scan_(_previous(decay, not reverse), g, not reverse)
        grad_B[..., n] = (g * drive).sum(-1)
        grad_drive.addcmul_(g, B_n)

        g.mul_(decay)
        if grad_initial is not None:
            grad_initial[..., n] = g[first]
        before = _previous(h, reverse)
        if initial is not None:
            before[first] = initial[..., n]
        grad_exponent = g.mul_(before)
        grad_delta.addcmul_(grad_exponent, A_n)
        grad_A[:, n] = grad_exponent.mul_(delta).sum((0, 1, 2))
    grad_delta.addcmul_(grad_drive, u)
    return grad_drive.mul_(delta), grad_delta, grad_A, grad_B, grad_C
