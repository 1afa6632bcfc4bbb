"""``retention`` in plain PyTorch, forward and backward, for any device: the scan of
:mod:`vmamba_mm.ops.ssd.chunks` with a constant decay and without weights."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.ssd import chunks


def _decays(q, log_decay, dtype):
    return log_decay.to(dtype).expand(q.shape[:3])


def forward(q, k, v, log_decay, initial_state, return_final_state, chunk_len=None
            ) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.retention`."""
    dtype = compute_dtype(v.dtype)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    state = chunks.scan(
        v, _decays(q, log_decay, dtype), None, k, q, initial_state, None, False,
        return_final_state, lambda block, x, y: block.put(out, y), chunk_len)
    return out, out.new_empty(0, dtype=dtype) if state is None else state


def backward(grad_y, grad_state, q, k, v, log_decay, initial_state, return_final_state,
             chunk_len=None):
    """Gradients by q, k, v, log_decay and initial_state (None where that is)."""
    dtype = compute_dtype(v.dtype)
    if grad_y is None:
        grad_y = torch.zeros_like(v)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format)
                              for t in (q, k, v))

    def write(block, x, by_v, by_k, by_q):
        for into, grad in ((grad_q, by_q), (grad_k, by_k), (grad_v, by_v)):
            block.put(into, grad)

    grad_decay, _, grad_initial = chunks.scan_backward(
        v, _decays(q, log_decay, dtype), None, k, q, initial_state, None, False,
        grad_state if return_final_state else None,
        lambda block, x, y: block.cut(grad_y[block.place], dtype), write, chunk_len=chunk_len)
    if grad_initial is not None:
        grad_initial = grad_initial.to(initial_state.dtype)
    return (grad_q, grad_k, grad_v, grad_decay.sum((0, 1)).to(log_decay.dtype), grad_initial)
