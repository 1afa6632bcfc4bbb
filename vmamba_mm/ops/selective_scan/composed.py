"""The scan with a gate and in reversed time, around an implementation that has neither."""

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan.activations import silu_backward


class Composed:
    """``forward`` and ``backward`` of the op, by those of a module that takes neither ``z`` nor
    states nor ``reverse``: sequences are flipped in memory, and the gate is a product afterwards.
    """

    def __init__(self, module: ModuleType):
        self._module = module

    def forward(self, u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus,
                return_final_state, reverse, out_dtype) -> tuple[Tensor, None]:
        dtype = compute_dtype(u.dtype)
        u, delta, B, C = _in_time(reverse, u, delta, B, C)
        y = self._module.forward(u, delta, A, B, C, D, delta_bias, delta_softplus,
                                 out_dtype if z is None else dtype)
        y, = _in_time(reverse, y)
        if z is not None:
            y = (y * F.silu(z.to(dtype))).to(out_dtype)
        return y, None

    def backward(self, grad_y, grad_state, u, delta, A, B, C, D, delta_bias, z, initial_state,
                 delta_softplus, return_final_state, reverse):
        dtype, grad_z = compute_dtype(u.dtype), None
        u, delta, B, C = _in_time(reverse, u, delta, B, C)
        if z is not None:
            y = self._module.forward(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype)
            y, = _in_time(reverse, y)
            grad_y, gate = grad_y.to(dtype), z.to(dtype)
            grad_z = silu_backward(grad_y * y, gate).to(z.dtype).contiguous()
            grad_y = grad_y * F.silu(gate)
        grad_y, = _in_time(reverse, grad_y)
        grad_u, grad_delta, grad_A, grad_B, grad_C, *rest = self._module.backward(
            grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus)
        grad_u, grad_delta, grad_B, grad_C = _in_time(reverse, grad_u, grad_delta, grad_B, grad_C)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, *rest, grad_z, None


def why_not(initial_state, return_final_state) -> str | None:
    """The reason why :class:`Composed` cannot take a call, or None."""
    if initial_state is None and not return_final_state:
        return None
    return 'it has no ' + ('return_final_state' if initial_state is None else 'initial_state')


def _in_time(reverse: bool, *sequences: Tensor) -> tuple[Tensor, ...]:
    """(..., L) in the order of time; the other way round too."""
    return tuple(t.flip(-1) for t in sequences) if reverse else sequences
