"""selective_scan by the CUDA "walk" kernels: fp16, bf16 and fp32, any number of states."""

import torch
from torch import Tensor

from vmamba_mm.ops import walk


def why_not(u, delta, A, B, C, D, delta_bias, out_dtype) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    given = [t for t in (delta, A, B, C, D, delta_bias) if t is not None]
    if any(t.device != u.device for t in given):
        return 'the inputs are on different devices'
    if any(t.dtype not in walk.TYPES for t in given):
        return 'an input is neither float32 nor float16 nor bfloat16'
    if out_dtype not in walk.TYPES:
        return f'out_dtype is {out_dtype}; the kernels give float16, bfloat16 and float32'
    return walk.why_not(u, 0, A.shape[1])


def _start(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The launches, and u, delta, B, C in one dtype, contiguous."""
    dtype = u.dtype if all(t.dtype == u.dtype for t in (delta, B, C)) else torch.float32
    u, delta, B, C = (t.to(dtype).contiguous() for t in (u, delta, B, C))
    launches = walk.Walk(u.unsqueeze(2), B.shape[1], 0, (None, delta_bias, A, D), True)
    launches.softplus = int(delta_softplus)
    return launches, delta, B, C


def forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.selective_scan`; inputs for which ``why_not`` is None."""
    launches, delta, B, C = _start(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y = launches.maps(out_dtype)
    launches.forward(delta, B, C, y, None)
    return launches.merge_groups(y, out_dtype)


def backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients by u, delta, A, B, C, D, delta_bias (None where the input is None).

    The states between chunks are computed again.
    """
    inputs = (u, delta, A, B, C, D, delta_bias)
    launches, delta, B, C = _start(u, delta, A, B, C, D, delta_bias, delta_softplus)
    dtype = delta.dtype
    states = launches.empty(*walk.states_shape(
        launches.batch, launches.routes, launches.length, launches.state, launches.dim))
    launches.forward(delta, B, C, None, states)
    grad_u, grad_delta = launches.maps(dtype), launches.maps(dtype)
    parts = {}

    def outputs(columns: int):
        for name in ('grad_B', 'grad_C'):
            parts[name] = launches.empty(columns, *B.shape,
                                         dtype=dtype if columns == 1 else torch.float32)
        return dict(parts, grad_raw=grad_delta)

    grad_y = grad_y.to(dtype).contiguous().unsqueeze(2)
    sums = launches.backward(delta, B, C, states, grad_y, grad_u, outputs)
    grad_B, grad_C = (t[0] if len(t) == 1 else t.sum(0) for t in parts.values())
    by_A, by_bias, by_D = sums.split((launches.states, 1, 1), dim=2)
    by_A = by_A.flatten(1, 2)[:, :launches.state].transpose(1, 2).reshape(A.shape)
    grads = (launches.merge_groups(grad_u, dtype), launches.merge_groups(grad_delta, dtype), by_A,
             grad_B, grad_C, by_D[:, 0].reshape(-1), by_bias.sum(1).reshape(-1))
    return tuple(None if t is None else g.to(t.dtype)
                 for g, t in zip(grads, inputs, strict=True))
