"""``ssd`` by the CUDA kernels in ``kernels/ssd``: fp16, bf16 and fp32 on the tensor cores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.launch import cached, device_limits, pointer, why_not_beside
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.selective_scan.activations import silu_backward
from vmamba_mm.ops.ssd import cuda_launch as launches
from vmamba_mm.ops.ssd.cuda_backward import BackwardLaunch, backward_launch
from vmamba_mm.ops.ssd.cuda_launch import Options, Sizes, Strides

_MOST_SAMPLES = 65535  # blocks of a launch in its third dimension


def why_not(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    reason = (scan_kernels.why_not(x, 0, 1)
              or why_not_beside(x, dt, A, B, C, D, dt_bias, z, initial_state))
    if reason is not None:
        return reason
    if seq_idx is not None and seq_idx.device != x.device:
        return 'the inputs are on different devices'
    dim, state = x.shape[3], B.shape[3]
    if dim % 8 or dim > launches.MOST_CHANNELS:
        return f'P is {dim}; the kernels take multiples of 8 up to {launches.MOST_CHANNELS}'
    if state % 8 or state > launches.STATES[-1]:
        return f'N is {state}; the kernels take multiples of 8 up to {launches.STATES[-1]}'
    if len(x) > _MOST_SAMPLES:
        return f'the batch is of more than {_MOST_SAMPLES} samples'
    training = wants_grad(x, dt, A, B, C, D, dt_bias, z, initial_state)
    return _why_not_here(x.device.index, _common_dtype(x, B, C, z).itemsize, dim, state, training)


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


def _map(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, with rows that are without gaps and begin at multiples of 16 bytes."""
    if t.dtype != dtype:
        t = t.to(dtype)
    b, l, h, last = t.stride()  # noqa: E741
    if last != 1 or (b | l | h) * dtype.itemsize % 16 or t.data_ptr() % 16 or max(l, h) >= 2**31:
        t = t.contiguous()
        if t.data_ptr() % 16:
            t = t.clone()
    return t


def _steps(dt: Tensor) -> Tensor:
    return dt.contiguous() if max(dt.stride()) >= 2**31 else dt


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


# What follows from sizes and dtypes alone, by what is quick to ask of tensors.

def _strides(strides: tuple[int, ...] | None) -> Strides:
    return Strides(0, 0, 0) if strides is None else Strides(*strides[:3])


def _contiguous(*shape: int) -> Strides:
    """Of (B, L, H, ...)."""
    return Strides(math.prod(shape[1:]), math.prod(shape[2:]), math.prod(shape[3:]))


@cached
def _forward_launch(index, dtype, fast, shape, shared, types, softplus, low, high, reverse, x, z,
                    dt, B, C) -> launches.Launch:
    """``shared`` is the shape of B, ``types`` those of dt, A, D, dt_bias and the dimensions of D;
    what follows are strides."""
    return launches.forward_launch(
        index, dtype, fast, Sizes(*shape, *shared[2:]),
        Options(*types, softplus, low, high, reverse), _strides(x), _strides(z),
        _contiguous(*shape), _strides(dt), _strides(B), _strides(C))


@cached
def _backward_launch(index, dtype, fast, shape, shared, types, softplus, low, high, reverse, x, dy,
                     dt, B, C) -> BackwardLaunch:
    """As :func:`_forward_launch`."""
    of_shared = _contiguous(*shared)
    return backward_launch(
        index, dtype, fast, Sizes(*shape, *shared[2:]),
        Options(*types, softplus, low, high, reverse), *map(_strides, (x, dy, dt, B, C)),
        _contiguous(*shape), _contiguous(*shape[:3]), of_shared, of_shared)


def forward(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.ssd`; the second result is empty without
    ``return_final_state``."""
    out_dtype, dtype = x.dtype, _common_dtype(x, B, C, z)
    x, B, C = _map(x, dtype), _map(B, dtype), _map(C, dtype)
    z = None if z is None else _map(z, dtype)
    dt, A, D, dt_bias = _steps(dt), _dense(A), _dense(D), _dense(dt_bias)
    start, index = _as_state(initial_state), _as_index(seq_idx)
    batch, _, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    last = torch.empty((batch, heads, dim, B.shape[3]) if return_final_state else 0,
                       dtype=torch.float32, device=x.device)
    launch = _forward_launch(
        x.get_device(), dtype, _is_fast(dtype), x.shape, B.shape,
        (dt.dtype, A.dtype, _dtype(D), D is not None and D.dim() == 2, _dtype(dt_bias)),
        dt_softplus, dt_min, dt_max, reverse, x.stride(), None if z is None else z.stride(),
        dt.stride(), B.stride(), C.stride())
    memory = x.new_empty(launch.memory, dtype=torch.uint8) if launch.memory else None
    if launch.zeros:
        memory[:launch.zeros].zero_()
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
    x, B, C, dy = _map(x, dtype), _map(B, dtype), _map(C, dtype), _map(grad_y, dtype)
    dt, A, D, dt_bias = _steps(dt), _dense(A), _dense(D), _dense(dt_bias)
    start, index = _as_state(initial_state), _as_index(seq_idx)
    batch, length, heads, dim = x.shape
    chunks = -(-length // launches.CHUNK)
    grad_last = _as_state(grad_state) if return_final_state else None
    grad_start = None if start is None else torch.empty_like(start)
    dx, dB, dC = (torch.empty(t.shape, dtype=dtype, device=x.device) for t in (x, B, C))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    launch = _backward_launch(
        x.get_device(), dtype, _is_fast(dtype), x.shape, B.shape,
        (dt.dtype, A.dtype, _dtype(D), D is not None and D.dim() == 2, _dtype(dt_bias)),
        dt_softplus, dt_min, dt_max, reverse, x.stride(), dy.stride(), dt.stride(), B.stride(),
        C.stride())

    def parts(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    head_parts = parts(2, batch * chunks, heads)
    D_parts = None if D is None else parts(batch * chunks, heads, dim)
    BC_parts = parts(2, launch.splits, *B.shape) if launch.splits > 1 else None
    memory = x.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(x=x.data_ptr(), dy=dy.data_ptr(), dt=dt.data_ptr(), A=A.data_ptr(), B=B.data_ptr(),
               C=C.data_ptr(), dx=dx.data_ptr(), ddt=ddt.data_ptr(), dB=dB.data_ptr(),
               dC=dC.data_ptr(), BC_parts=pointer(BC_parts), head_parts=head_parts.data_ptr(),
               memory=memory.data_ptr(), D=pointer(D), D_parts=pointer(D_parts),
               bias=pointer(dt_bias), start=pointer(start), grad_last=pointer(grad_last),
               grad_start=pointer(grad_start), seq_idx=pointer(index))
    # Each sum is a tensor of its own, not a view at an odd place of memory.
    if BC_parts is not None:
        dB, dC = (part.sum(0) for part in BC_parts)
    dA = head_parts[0].sum(0)
    dbias = None if dt_bias is None else head_parts[1].sum(0)
    dD = None if D is None else D_parts.sum(0) if D.dim() == 2 else D_parts.sum((0, 2))
    grads = dx, ddt, dA, dB, dC, dD, dbias, grad_z, grad_start
    return tuple(None if t is None else grad.to(t.dtype).contiguous()
                 for grad, t in zip(grads, given, strict=True))
