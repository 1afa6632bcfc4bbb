"""selective_scan by the CUDA kernels in ``kernels/scan1d``: half and fp32, up to 128 states."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, cached, pointer, why_not_beside
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.selective_scan import cuda_scan as scans
from vmamba_mm.ops.selective_scan.cuda_scan import RowStrides, Sizes, Strides, Types


def why_not(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, return_final_state,
            reverse, out_dtype) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    reason = why_not_beside(u, delta, A, B, C, D, delta_bias, z, initial_state)
    if reason is not None:
        return reason
    if out_dtype not in TYPES:
        return f'out_dtype is {out_dtype}; the kernels give float16, bfloat16 and float32'
    if B.numel() >= 2**31 * B.shape[0]:
        return 'B of a sample has 2^31 elements or more'
    return scan_kernels.why_not(u, 0, 1) or _why_not_here(u.device.index, u.dtype, A.shape[1])


@torch.compiler.assume_constant_result
def _why_not_here(index: int, dtype: torch.dtype, state: int) -> str | None:
    return scans.why_not_on(index, dtype, state)


def _start(u, delta, B, C, z):
    """Maps in one dtype, without gaps."""
    dtype = u.dtype
    if not (delta.dtype == B.dtype == C.dtype == dtype and (z is None or z.dtype == dtype)):
        u, delta, B, C, z = [None if t is None else t.float() for t in (u, delta, B, C, z)]
    return u.contiguous(), delta.contiguous(), B.contiguous(), C.contiguous(), _dense(z)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _as_state(t: Tensor | None) -> Tensor | None:
    """In fp32, without gaps, at a multiple of 16 bytes."""
    return None if t is None else scan_kernels.dense(t.float())


# What follows from sizes and dtypes alone, by what is quick to ask of tensors.

def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _arrange(shape, routes, state, reverse, *names):
    """Sizes, the strides of maps, and those of B and C."""
    batch, channels, length = shape
    sizes = Sizes(batch, routes, channels // routes, length, state,
                  (1 << routes) - 1 if reverse else 0)
    of = Strides(channels * length, sizes.dim * length, length)
    return (sizes, tuple((name, of) for name in names),
            RowStrides(routes * state * length, state * length, length, 1))


@cached
def _forward_launch(index, dtype, shape, routes, state, A, D, bias, softplus, reverse, out_dtype
                    ) -> scans.Launch:
    sizes, strides, rows = _arrange(shape, routes, state, reverse, 'u', 'delta', 'z', 'y')
    return scans.forward_launch(index, dtype, sizes, False, Types(A, D, bias), softplus, strides,
                                rows, rows, out_dtype)


@cached
def _backward_launch(index, dtype, shape, routes, state, A, D, bias, softplus, reverse, dB, dC,
                     gated) -> scans.Launch:
    sizes, strides, rows = _arrange(shape, routes, state, reverse, 'u', 'delta', 'z', 'y', 'grad',
                                    'du', 'ddelta', 'dz')
    return scans.backward_launch(index, dtype, sizes, False, Types(A, D, bias), softplus, strides,
                                 rows, rows, rows, rows, (dB, dC), gated)


# --- on tensors -------------------------------------------------------------------------------

def forward(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, return_final_state,
            reverse, out_dtype) -> tuple[Tensor, Tensor | None]:
    """Shapes as in :func:`vmamba_mm.ops.selective_scan`; inputs for which ``why_not`` is None."""
    u, delta, B, C, z = _start(u, delta, B, C, z)
    A, D, delta_bias = _dense(A), _dense(D), _dense(delta_bias)
    start = _as_state(initial_state)
    shape, state = u.shape, A.shape[1]
    y = torch.empty_like(u, dtype=out_dtype)
    end = None
    if return_final_state:
        end = u.new_empty((*shape[:2], state), dtype=torch.float32)
    launch = _forward_launch(u.get_device(), u.dtype, shape, B.shape[1], state, A.dtype, _dtype(D),
                             _dtype(delta_bias), delta_softplus, reverse, out_dtype)
    memory = u.new_empty(launch.memory, dtype=torch.uint8) if launch.memory else None
    launch.run(u=u.data_ptr(), delta=delta.data_ptr(), A=A.data_ptr(), B=B.data_ptr(),
               C=C.data_ptr(), y=y.data_ptr(), memory=pointer(memory), D=pointer(D),
               bias=pointer(delta_bias), z=pointer(z), start=pointer(start),
               end=pointer(end))
    return y, end


def backward(grad_y, grad_state, u, delta, A, B, C, D, delta_bias, z, initial_state,
             delta_softplus, return_final_state, reverse):
    """Gradients by u, delta, A, B, C, D, delta_bias, z, initial_state (None where the input is
    None).

    The states within the sequence are computed again.
    """
    inputs = u, delta, A, B, C, D, delta_bias, z, initial_state
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    dtypes = u.dtype, delta.dtype, _dtype(z)
    u, delta, B, C, z = _start(u, delta, B, C, z)
    if grad_y.dtype != u.dtype:
        grad_y = grad_y.to(u.dtype)
    grad_y = grad_y.contiguous()
    A, D, delta_bias = _dense(A), _dense(D), _dense(delta_bias)
    start = _as_state(initial_state)
    end_grad = _as_state(grad_state) if return_final_state else None
    du, ddelta = torch.empty_like(u), torch.empty_like(u)
    dA, dD, dbias = [None if t is None else torch.empty_like(t) for t in (A, D, delta_bias)]
    dB, dC = [torch.empty_like(t, dtype=given.dtype)
              for t, given in zip((B, C), inputs[3:5], strict=True)]
    dz, y = (None, None) if z is None else (torch.empty_like(z), torch.empty_like(u))
    start_grad = None if start is None else torch.empty_like(start)
    launch = _backward_launch(u.get_device(), u.dtype, u.shape, B.shape[1], A.shape[1], A.dtype,
                              _dtype(D), _dtype(delta_bias), delta_softplus, reverse, dB.dtype,
                              dC.dtype, z is not None)
    memory = u.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(u=u.data_ptr(), delta=delta.data_ptr(), A=A.data_ptr(), B=B.data_ptr(),
               C=C.data_ptr(), grad=grad_y.data_ptr(), du=du.data_ptr(), ddelta=ddelta.data_ptr(),
               dA=dA.data_ptr(), dB=dB.data_ptr(), dC=dC.data_ptr(), memory=memory.data_ptr(),
               D=pointer(D), bias=pointer(delta_bias), z=pointer(z), start=pointer(start),
               dD=pointer(dD), dbias=pointer(dbias), dz=pointer(dz), y=pointer(y),
               end_grad=pointer(end_grad), start_grad=pointer(start_grad))
    grads = du, ddelta, dA, dB, dC, dD, dbias, dz, start_grad
    given = *dtypes, _dtype(initial_state)
    if given == (u.dtype, u.dtype, _dtype(z), _dtype(start)):
        return grads
    return tuple(None if t is None else g.to(t.dtype)
                 for g, t in zip(grads, inputs, strict=True))
