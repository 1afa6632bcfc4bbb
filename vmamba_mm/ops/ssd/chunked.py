"""``ssd`` in plain PyTorch, forward and backward, for any device.

dt, skip and gate around the scan of :mod:`vmamba_mm.ops.ssd.chunks`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan.activations import silu_backward, softplus
from vmamba_mm.ops.ssd import chunks
from vmamba_mm.ops.ssd.reference import number_segments

#: Above it softplus is the identity.
_THRESHOLD = 20.0


def finish_dt(raw: Tensor, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """dt as it is used, from what has its bias; as :func:`.reference.finish_dt`, but quicker."""
    if dt_softplus:
        raw = torch.where(raw > _THRESHOLD, raw, softplus(raw))
    return raw.clamp(dt_min, dt_max)


def finish_dt_backward(grad: Tensor, raw: Tensor, dt_softplus: bool, dt_min: float, dt_max: float
                       ) -> Tensor:
    """The gradient by ``raw`` from that by the result of :func:`finish_dt`."""
    dt = finish_dt(raw, dt_softplus, -torch.inf, torch.inf)
    grad = torch.where((dt < dt_min) | (dt > dt_max), 0, grad)
    return torch.where(raw > _THRESHOLD, grad, grad * raw.sigmoid()) if dt_softplus else grad


class _Around:
    """The skip D x and the gate z, which follow the scan."""

    def __init__(self, x: Tensor, D: Tensor | None, z: Tensor | None):
        self.dtype, self.z = compute_dtype(x.dtype), z
        self.D = None if D is None else D.to(self.dtype).reshape(x.shape[2], -1)

    def result(self, block: chunks.Block, x: Tensor, y: Tensor) -> Tensor:
        """From x and the scan's y, which is overwritten, (M, c, Q, H, P)."""
        if self.D is not None:
            y.addcmul_(x, self.D)
        if self.z is not None:
            y.mul_(F.silu(block.cut(self.z[block.place], self.dtype)))
        return y

    def gradients(self, block: chunks.Block, x: Tensor, y: Tensor | None, grad: Tensor
                  ) -> tuple[Tensor, Tensor | None]:
        """The gradients by the scan's y, which is overwritten, and by z."""
        if self.z is None:
            return grad, None
        z = block.cut(self.z[block.place], self.dtype)
        if self.D is not None:
            y.addcmul_(x, self.D)
        return grad * F.silu(z), silu_backward(y.mul_(grad), z)


def _prepare(dt, A, dt_bias, seq_idx, reverse, dtype):
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    return raw, A.to(dtype), None if seq_idx is None else number_segments(seq_idx, reverse)


def forward(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse, chunk_len=None) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.ssd`."""
    dtype = compute_dtype(x.dtype)
    raw, rates, segments = _prepare(dt, A, dt_bias, seq_idx, reverse, dtype)
    weight = finish_dt(raw, dt_softplus, dt_min, dt_max)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    around = _Around(x, D, z)

    def write(block, x, y):
        block.put(out, around.result(block, x, y))

    state = chunks.scan(x, weight * rates, weight, B, C, initial_state, segments, reverse,
                        return_final_state, write, chunk_len)
    return out, raw.new_empty(0) if state is None else state


def backward(grad_y, grad_state, x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx,
             dt_softplus, dt_min, dt_max, return_final_state, reverse, chunk_len=None):
    """Gradients by x, dt, A, B, C, D, dt_bias, z, initial_state (None where those are)."""
    dtype = compute_dtype(x.dtype)
    raw, rates, segments = _prepare(dt, A, dt_bias, seq_idx, reverse, dtype)
    weight = finish_dt(raw, dt_softplus, dt_min, dt_max)
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    grad_x, grad_B, grad_C, grad_z = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, B, C, z))
    grad_D = None if D is None else D.new_zeros(x.shape[2:], dtype=dtype)
    around = _Around(x, D, z)
    grads = []  # by y, of the block that is at work

    def read(block, x, y):
        grad, of_z = around.gradients(block, x, y, block.cut(grad_y[block.place], dtype))
        if z is not None:
            block.put(grad_z, of_z)
        grads.append(grad)
        return grad

    def write(block, x, gx, gB, gC):
        grad = grads.pop()
        if D is not None:
            gx.addcmul_(grad, around.D)
            grad_D.add_((grad * x).sum((0, 1, 2)))
        block.put(grad_x, gx)
        block.put(grad_B, gB)
        block.put(grad_C, gC)

    grad_decay, grad_weight, grad_initial = chunks.scan_backward(
        x, weight * rates, weight, B, C, initial_state, segments, reverse,
        grad_state if return_final_state else None, read, write, z is not None, chunk_len)
    grad_A = (grad_decay * weight).sum((0, 1)).to(A.dtype)
    grad_dt = finish_dt_backward(grad_weight.addcmul_(grad_decay, rates), raw, dt_softplus, dt_min,
                                 dt_max)
    grad_bias = None if dt_bias is None else grad_dt.sum((0, 1)).to(dt_bias.dtype)
    if D is not None:
        grad_D = (grad_D.sum(1) if D.dim() == 1 else grad_D).to(D.dtype)
    return (grad_x, grad_dt.to(dt.dtype).contiguous(), grad_A, grad_B, grad_C, grad_D, grad_bias,
            grad_z, grad_initial)
