"""``ssd`` by the CUDA kernels in ``kernels/ssd``: fp16, bf16 and fp32 on the tensor cores."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, cached, device_limits, pointer
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.ssd import cuda_launch as launches
from vmamba_mm.ops.ssd.cuda_launch import Options, Sizes, Strides

_NONE = Strides(0, 0, 0)


def why_not(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if seq_idx is not None:
        return 'they do not take seq_idx'
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
    return scan_kernels.why_not(x, 0, 1) or _why_not_here(
        x.device.index, _common_dtype(x, B, C, z), dim, state)


@torch.compiler.assume_constant_result
def _why_not_here(index: int, dtype: torch.dtype, dim: int, state: int) -> str | None:
    return _why_not_on(index, dtype, dim, state)


@cached
def _why_not_on(index: int, dtype: torch.dtype, dim: int, state: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f'a GPU of compute capability {capability} is too old for them'
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
    start, sizes = _as_state(initial_state), _sizes(x, B)
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
               last=last.data_ptr() if return_final_state else 0)
    return y if dtype == out_dtype else y.to(out_dtype), last
