"""selective_scan by the CUDA kernels in ``kernels/scan``: half and fp32, any number of states."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, pointer
from vmamba_mm.ops.scan_kernels import cuda as scans


def why_not(u, delta, A, B, C, D, delta_bias, out_dtype) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    tensors = [t for t in (delta, A, B, C, D, delta_bias) if t is not None]
    if any(t.device != u.device for t in tensors):
        return 'the inputs are on different devices'
    if any(t.dtype not in TYPES for t in tensors):
        return 'an input is neither float32 nor float16 nor bfloat16'
    if out_dtype not in TYPES:
        return f'out_dtype is {out_dtype}; the kernels give float16, bfloat16 and float32'
    return scans.why_not(u, 0, A.shape[1])


def _start(u, delta, A, B, C, D, delta_bias):
    """u, delta, B, C in one dtype, contiguous; sizes; the parameters as the kernels take them."""
    dtype = u.dtype if all(t.dtype == u.dtype for t in (delta, B, C)) else torch.float32
    u, delta, B, C = (t.to(dtype).contiguous() for t in (u, delta, B, C))
    batch, channels, length = u.shape
    routes = B.shape[1]
    sizes = batch, channels // routes, 1, length, 0, routes
    return u, delta, B, C, sizes, scans.prepare(sizes, (None, delta_bias, A, D), merged=False)


def _empty(u: Tensor, dtype: torch.dtype, state: int) -> Tensor:
    """Memory for the results of each scan."""
    return u.new_empty((scans.groups_of(state)[1], *u.shape), dtype=scans.maps_dtype(dtype, state))


def _forward(u, delta, B, C, sizes, prepared, state, delta_softplus, out_dtype, y, states):
    """Fill ``y`` and ``states``, where given."""
    launch = scans.forward_launch(u.get_device(), u.dtype, sizes, state, sequence=True,
                                  softplus=delta_softplus, written=out_dtype)
    memory = u.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(x=u.data_ptr(), projected=delta.data_ptr(), prepared=prepared.data_ptr(),
               maps=pointer(y), states=pointer(states), memory=memory.data_ptr(), B=B.data_ptr(),
               C=C.data_ptr())


def forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.selective_scan`; inputs for which ``why_not`` is None."""
    u, *rest = _start(u, delta, A, B, C, D, delta_bias)
    state = A.shape[1]
    y = _empty(u, out_dtype, state)
    _forward(u, *rest, state, delta_softplus, out_dtype, y, None)
    return scans.merge_groups(y, out_dtype)


def backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients by u, delta, A, B, C, D, delta_bias (None where the input is None).

    The states between chunks are computed again.
    """
    inputs = (u, delta, A, B, C, D, delta_bias)
    u, delta, B, C, sizes, prepared = _start(*inputs)
    dtype, state = u.dtype, A.shape[1]
    batch, dim, _, length, _, routes = sizes
    states = u.new_empty(scans.states_shape(batch, routes, length, state, dim), dtype=torch.float32)
    _forward(u, delta, B, C, sizes, prepared, state, delta_softplus, dtype, None, states)
    launch = scans.backward_launch(u.get_device(), dtype, sizes, state, sequence=True,
                                   softplus=delta_softplus)
    grad_u, grad_delta = _empty(u, dtype, state), _empty(u, dtype, state)
    grad_B, grad_C = (u.new_empty((launch.columns, *B.shape),
                                  dtype=dtype if launch.columns == 1 else torch.float32)
                      for _ in range(2))
    sums = scans.empty_sums(u, sizes, state, launch.parts)
    memory = u.new_empty(launch.memory, dtype=torch.uint8)
    grad_y = grad_y.to(dtype).contiguous()
    launch.run(x=u.data_ptr(), projected=delta.data_ptr(), prepared=prepared.data_ptr(),
               states=states.data_ptr(), grad=grad_y.data_ptr(), maps=grad_u.data_ptr(),
               dprojected=grad_delta.data_ptr(), sums=sums.data_ptr(), memory=memory.data_ptr(),
               B=B.data_ptr(), C=C.data_ptr(), grad_B=grad_B.data_ptr(), grad_C=grad_C.data_ptr())
    grad_B, grad_C = (t[0] if len(t) == 1 else t.sum(0) for t in (grad_B, grad_C))
    _, by_bias, by_A, by_D = scans.finish(sums, sizes, (None, delta_bias, A, D))
    grads = (scans.merge_groups(grad_u, dtype), scans.merge_groups(grad_delta, dtype), by_A, grad_B,
             grad_C, by_D, by_bias)
    return tuple(None if t is None else g.to(t.dtype)
                 for g, t in zip(grads, inputs, strict=True))
