"""``ssd`` by the CUDA kernels in ``kernels/ssd``: fp16, bf16 and fp32 on the tensor cores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.launch import TYPES, cached, device_limits, pointer
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.selective_scan.activations import silu_backward
from vmamba_mm.ops.ssd import cuda_launch as launches
from vmamba_mm.ops.ssd.cuda_backward import backward_launch
from vmamba_mm.ops.ssd.cuda_launch import Options, Sizes, Strides

_NONE = Strides(0, 0, 0)
_MOST_SAMPLES = 65535  # blocks of a launch in its third dimension


def why_not(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if seq_idx is not None and seq_idx.device != x.device:
        return 'the inputs are on different devices'
    for t in (dt, A, B, C, D, dt_bias, z, initial_state):
        if t is None:
            continue
        if t.device != x.device:
            return 'the inputs are on different devices'
        if t.dtype not in TYPES:
            return 'an input is neither float32 nor float16 nor bfloat16'
    dim, state = x.shape[3], B.shape[3]
    if dim % 8 or dim > launches.MOST_CHANNELS:
        return f'P is {dim}; the kernels take multiples of 8 up to {launches.MOST_CHANNELS}'
    if state % 8 or state > launches.STATES[-1]:
        return f'N is {state}; the kernels take multiples of 8 up to {launches.STATES[-1]}'
    if len(x) > _MOST_SAMPLES:
        return f'the batch is of more than {_MOST_SAMPLES} samples'
    training = wants_grad(x, dt, A, B, C, D, dt_bias, z, initial_state)
    return scan_kernels.why_not(x, 0, 1) or _why_not_here(
        x.device.index, _common_dtype(x, B, C, z).itemsize, dim, state, training)


@torch.compiler.assume_constant_result
def _why_not_here(index: int, size: int, dim: int, state: int, training: bool) -> str | None:
    return _why_not_on(index, size, dim, state, training)


@cached
def _why_not_on(index: int, size: int, dim: int, state: int, training: bool) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f'a GPU of compute capability {capability} is too old for them'
    shared, limit = launches.least_shared(size, dim, state, training), device_limits(index)[2]
    if shared > limit:
        return (f'P={dim} and N={state} need {shared} bytes of shared memory'
                f'{" in training" if training else ""}, and this GPU has {limit}')
    return None


def _common_dtype(x, B, C, z) -> torch.dtype:
    """That of x where all maps have it, else fp32."""
    dtype = x.dtype
    return dtype if B.dtype == C.dtype == dtype and (z is None or z.dtype == dtype) \
        else torch.float32


def _map(t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Strides]:
    """In ``dtype``, with rows that are without gaps and begin at multiples of 16 bytes."""
    if t is None:
        return None, _NONE
    if t.dtype != dtype:
        t = t.to(dtype)
    b, l, h, last = t.stride()  # noqa: E741
    if last != 1 or (b | l | h) * dtype.itemsize % 16 or t.data_ptr() % 16 or max(l, h) >= 2**31:
        t = t.contiguous()
        if t.data_ptr() % 16:
            t = t.clone()
        b, l, h, _ = t.stride()  # noqa: E741
    return t, Strides(b, l, h)


def _steps(dt: Tensor) -> tuple[Tensor, Strides]:
    if max(dt.stride()) >= 2**31:
        dt = dt.contiguous()
    return dt, Strides(*dt.stride())


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _as_state(t: Tensor | None) -> Tensor | None:
    """In fp32, without gaps, at a multiple of 16 bytes."""
    return None if t is None else scan_kernels.dense(t.float())


def _as_index(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32).contiguous()


def _is_fast(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _sizes(x: Tensor, B: Tensor) -> Sizes:
    batch, length, heads, dim = x.shape
    return Sizes(batch, length, heads, dim, *B.shape[2:])


def forward(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.ssd`; the second result is empty without
    ``return_final_state``."""
    out_dtype, dtype = x.dtype, _common_dtype(x, B, C, z)
    (x, of_x), (B, of_B), (C, of_C), (z, of_z) = (_map(t, dtype) for t in (x, B, C, z))
    (dt, of_dt), A, D, dt_bias = _steps(dt), _dense(A), _dense(D), _dense(dt_bias)
    start, sizes, index = _as_state(initial_state), _sizes(x, B), _as_index(seq_idx)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    last = torch.empty((sizes.batch, sizes.heads, sizes.dim, sizes.state) if return_final_state
                       else 0, dtype=torch.float32, device=x.device)
    options = Options(dt.dtype, A.dtype, _dtype(D), D is not None and D.dim() == 2,
                      _dtype(dt_bias), dt_softplus, dt_min, dt_max, reverse)
    launch = launches.forward_launch(x.get_device(), dtype, _is_fast(dtype), sizes, options, of_x,
                                     of_z, Strides(*y.stride()[:3]), of_dt, of_B, of_C)
    memory = x.new_empty(launch.memory, dtype=torch.uint8) if launch.memory else None
    launch.run(x=x.data_ptr(), dt=dt.data_ptr(), A=A.data_ptr(), B=B.data_ptr(), C=C.data_ptr(),
               y=y.data_ptr(), memory=pointer(memory), D=pointer(D), bias=pointer(dt_bias),
               z=pointer(z), start=pointer(start),
               last=last.data_ptr() if return_final_state else 0, seq_idx=pointer(index))
    return y if dtype == out_dtype else y.to(out_dtype), last


def backward(grad_y, grad_state, x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx,
             dt_softplus, dt_min, dt_max, return_final_state, reverse):
    """Gradients by x, dt, A, B, C, D, dt_bias, z, initial_state (None where those are).

    The states of chunks are calculated again, and with a gate the result before it.
    """
    given = x, dt, A, B, C, D, dt_bias, z, initial_state
    dtype, grad_z = _common_dtype(x, B, C, z), None
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    if z is not None:
        y, _ = forward(x.to(dtype), dt, A, B, C, D, dt_bias, None, initial_state, seq_idx,
                       dt_softplus, dt_min, dt_max, False, reverse)
        gate, grad_y = z.float(), grad_y.float()
        grad_z = silu_backward(grad_y * y, gate).to(z.dtype).contiguous()
        grad_y = grad_y * F.silu(gate)
    (x, of_x), (B, of_B), (C, of_C), (dy, of_dy) = (_map(t, dtype) for t in (x, B, C, grad_y))
    (dt, of_dt), A, D, dt_bias = _steps(dt), _dense(A), _dense(D), _dense(dt_bias)
    start, sizes, index = _as_state(initial_state), _sizes(x, B), _as_index(seq_idx)
    grad_last = _as_state(grad_state) if return_final_state else None
    grad_start = None if start is None else torch.empty_like(start)
    dx, dB, dC = (torch.empty(t.shape, dtype=dtype, device=x.device) for t in (x, B, C))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    options = Options(dt.dtype, A.dtype, _dtype(D), D is not None and D.dim() == 2,
                      _dtype(dt_bias), dt_softplus, dt_min, dt_max, reverse)
    launch = backward_launch(
        x.get_device(), dtype, _is_fast(dtype), sizes, options, of_x, of_dy, of_dt, of_B, of_C,
        *(Strides(*t.stride()[:3]) for t in (dx, ddt, dB, dC)))

    def parts(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    head_parts = parts(2, sizes.batch * sizes.chunks, sizes.heads)
    D_parts = None if D is None else parts(sizes.batch * sizes.chunks, sizes.heads, sizes.dim)
    BC_parts = parts(2, launch.splits, *B.shape) if launch.splits > 1 else None
    memory = x.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(x=x.data_ptr(), dy=dy.data_ptr(), dt=dt.data_ptr(), A=A.data_ptr(), B=B.data_ptr(),
               C=C.data_ptr(), dx=dx.data_ptr(), ddt=ddt.data_ptr(), dB=dB.data_ptr(),
               dC=dC.data_ptr(), BC_parts=pointer(BC_parts), head_parts=head_parts.data_ptr(),
               memory=memory.data_ptr(), D=pointer(D), D_parts=pointer(D_parts),
               bias=pointer(dt_bias), start=pointer(start), grad_last=pointer(grad_last),
               grad_start=pointer(grad_start), seq_idx=pointer(index))
    if BC_parts is not None:
        dB, dC = BC_parts.sum(1)
    dA, dbias = head_parts.sum(1)
    dD = None if D is None else D_parts.sum(0) if D.dim() == 2 else D_parts.sum((0, 2))
    grads = (dx, ddt, dA, dB, dC, dD, None if dt_bias is None else dbias, grad_z, grad_start)
    return tuple(None if t is None else grad.to(t.dtype).contiguous()
                 for grad, t in zip(grads, given, strict=True))
