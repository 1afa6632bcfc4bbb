"""``mamba_inner`` with Triton's scan: the portable GPU path, else as :mod:`.chunked`.

What stands in for :mod:`vmamba_mm.ops.selective_scan.stepwise` there. The direction that runs
backwards in time is flipped in memory around its scan.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vmamba_mm.ops.selective_scan import triton_scan


def batch_blocks(batch: int, size: int, device: torch.device) -> Iterator[slice]:
    """The whole batch, which the scan itself takes apart."""
    return iter([slice(0, batch)])


def scan(u, delta, A, B, C, reverse: bool, out: Tensor) -> None:
    """Add the scan to ``out``: y_t = <C_t, h_t>, without the skip. All are (M, L, ...)."""
    u, delta, B, C = _to_time(reverse, u, delta, B, C)
    y = triton_scan.forward(u, delta, A, B[:, None], C[:, None], None, None, False, u.dtype)
    out += _from_time(reverse, y)


def scan_backward(grad_y, u, delta, A, B, C, reverse: bool, out: Tensor):
    """Gradients by u, delta, A, B, C; the result of the forward is added to ``out``."""
    scan(u, delta, A, B, C, reverse, out)
    grad_y, u, delta, B, C = _to_time(reverse, grad_y, u, delta, B, C)
    grad_u, grad_delta, grad_A, grad_B, grad_C, _, _ = triton_scan.backward(
        grad_y, u, delta, A, B[:, None], C[:, None], None, None, False)
    grad_u, grad_delta, grad_B, grad_C = (
        _from_time(reverse, t).contiguous()
        for t in (grad_u, grad_delta, grad_B[:, 0], grad_C[:, 0]))
    return grad_u, grad_delta, grad_A, grad_B, grad_C


def _to_time(reverse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(M, L, D) to (M, D, L), in the order of time."""
    return tuple((t.flip(1) if reverse else t).transpose(1, 2) for t in tensors)


def _from_time(reverse: bool, x_BDL: Tensor) -> Tensor:
    """The reverse of :func:`_to_time`."""
    x_BLD = x_BDL.transpose(1, 2)
    return x_BLD.flip(1) if reverse else x_BLD
