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
    if torch.compiler.is_compiling() or type(u) not in _PLAIN:
        return _why_not_such(u, B, out_dtype)
    # What follows from sizes and dtypes is found once.
    key, verdicts = (u.device, u.dtype, u.shape, B.shape, out_dtype), _verdicts()
    try:
        known = key in verdicts
    except TypeError:  # of sizes that are symbols
        return _why_not_such(u, B, out_dtype)
    if not known:
        if len(verdicts) >= _MOST_VERDICTS:
            verdicts.clear()
        verdicts[key] = _why_not_such(u, B, out_dtype)
    return verdicts[key]


_PLAIN, _MOST_VERDICTS = (Tensor, torch.nn.Parameter), 4096


@cached
def _verdicts() -> dict:
    return {}


def _why_not_such(u, B, out_dtype) -> str | None:
    if out_dtype not in TYPES:
        return f'out_dtype is {out_dtype}; the kernels give float16, bfloat16 and float32'
    if B.numel() >= 2**31 * B.shape[0]:
        return 'B of a sample has 2^31 elements or more'
    return scan_kernels.why_not(u, 0, 1) or _why_not_here(u.device.index, u.dtype, B.shape[2])


@torch.compiler.assume_constant_result
def _why_not_here(index: int, dtype: torch.dtype, state: int) -> str | None:
    return scans.why_not_on(index, dtype, state)


def _start(u, delta, B, C, z):
    """Maps in one dtype, without gaps."""
    dtype = u.dtype
    if not (delta.dtype == B.dtype == C.dtype == dtype and (z is None or z.dtype == dtype)):
        u, delta, B, C, z = [None if t is None else t.float() for t in (u, delta, B, C, z)]
    return (u.contiguous(), delta.contiguous(), B.contiguous(), C.contiguous(),
            z if z is None else z.contiguous())


def _as_state(t: Tensor | None) -> Tensor | None:
    """In fp32, without gaps, at a multiple of 16 bytes."""
    return None if t is None else scan_kernels.dense(t.float())


# What follows from sizes and dtypes alone, by what is quick to ask of tensors.

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
    A = A.contiguous()
    D = D if D is None else D.contiguous()
    delta_bias = delta_bias if delta_bias is None else delta_bias.contiguous()
    start = initial_state if initial_state is None else _as_state(initial_state)
    shape, dtype = u.shape, u.dtype
    y = torch.empty_like(u) if out_dtype == dtype else torch.empty_like(u, dtype=out_dtype)
    end = None
    if return_final_state:
        end = u.new_empty((*shape[:2], A.shape[1]), dtype=torch.float32)
    launch = _forward_launch(u.get_device(), dtype, shape, B.shape[1], A.shape[1], A.dtype,
                             D if D is None else D.dtype,
                             delta_bias if delta_bias is None else delta_bias.dtype,
                             delta_softplus, reverse, out_dtype)
    memory = u.new_empty(launch.memory // dtype.itemsize) if launch.memory else None
    launch.run(u.data_ptr(), delta.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr(),
               y.data_ptr(), 0 if memory is None else memory.data_ptr(),
               0 if D is None else D.data_ptr(), 0 if delta_bias is None else delta_bias.data_ptr(),
               0 if z is None else z.data_ptr(), 0 if start is None else start.data_ptr(),
               0 if end is None else end.data_ptr())
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
    u, delta, B, C, z = _start(u, delta, B, C, z)
    dtype = u.dtype
    if grad_y.dtype != dtype:
        grad_y = grad_y.to(dtype)
    grad_y = grad_y.contiguous()
    A = A.contiguous()
    empty_like = torch.empty_like
    du, ddelta, dA = empty_like(u), empty_like(delta), empty_like(A)
    dB, dC = [empty_like(t) if given is t or given.dtype == dtype
              else empty_like(t, dtype=given.dtype)
              for t, given in ((B, inputs[3]), (C, inputs[4]))]
    dD = dbias = start = end_grad = start_grad = dz = y = D_type = bias_type = None
    if D is not None:
        D = D.contiguous()
        dD, D_type = empty_like(D), D.dtype
    if delta_bias is not None:
        delta_bias = delta_bias.contiguous()
        dbias, bias_type = empty_like(delta_bias), delta_bias.dtype
    if z is not None:
        dz, y = empty_like(z), empty_like(u)
    if initial_state is not None:
        start = _as_state(initial_state)
        start_grad = empty_like(start)
    if return_final_state:
        end_grad = _as_state(grad_state)
    launch = _backward_launch(u.get_device(), dtype, u.shape, B.shape[1], A.shape[1], A.dtype,
                              D_type, bias_type, delta_softplus, reverse, dB.dtype, dC.dtype,
                              z is not None)
    memory = u.new_empty(launch.memory // dtype.itemsize)
    launch.run(u.data_ptr(), delta.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr(),
               grad_y.data_ptr(), du.data_ptr(), ddelta.data_ptr(), dA.data_ptr(), dB.data_ptr(),
               dC.data_ptr(), memory.data_ptr(), 0 if D is None else D.data_ptr(),
               0 if delta_bias is None else delta_bias.data_ptr(), pointer(z), pointer(start),
               0 if dD is None else dD.data_ptr(), 0 if dbias is None else dbias.data_ptr(),
               pointer(dz), pointer(y), pointer(end_grad), pointer(start_grad))
    grads = du, ddelta, dA, dB, dC, dD, dbias, dz, start_grad
    if (inputs[0].dtype == dtype == inputs[1].dtype and (z is None or inputs[7].dtype == dtype)
            and (start is None or initial_state.dtype == start.dtype)):
        return grads
    return tuple(None if t is None else g.to(t.dtype)
                 for g, t in zip(grads, inputs, strict=True))
