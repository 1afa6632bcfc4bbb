"""``wkv`` and ``bi_wkv`` by the CUDA kernels in ``kernels/wkv``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, pointer
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.wkv import cuda_launch as launches
from vmamba_mm.ops.wkv.cuda_launch import Sizes, Strides, Types

_FARTHEST = 2**28  # strides, in elements: their bytes are 32-bit numbers


def _why_not(w, u, k, v, state=None) -> str | None:
    reason = scan_kernels.why_not(v, 0, 1)
    if reason is not None:
        return reason
    for t in (w, u, k, state):
        if t is None:
            continue
        if t.device != v.device:
            return 'the inputs are on different devices'
        if t.dtype not in TYPES:
            return 'an input is neither float32 nor float16 nor bfloat16'
    batch, length, channels = v.shape
    if max(batch, length // 32) > launches.MOST_BLOCKS or channels >= _FARTHEST:
        return f'a map of {tuple(v.shape)} is too large'
    return None


def why_not(w, u, k, v, state, return_state) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return _why_not(w, u, k, v, state)


def bi_why_not(w, u, k, v, blocks, eps) -> str | None:
    reason = _why_not(w, u, k, v)
    if reason is None and blocks and -(-v.shape[1] // blocks) > _longest_block(v.device.index):
        return (f'{v.shape[1]} tokens in {blocks} blocks; on this GPU the kernels take blocks of '
                f'up to {_longest_block(v.device.index)}')
    return reason


@torch.compiler.assume_constant_result
def _longest_block(index: int) -> int:
    return launches.longest_block(index)


def _map(t: Tensor) -> tuple[Tensor, Strides]:
    if max(t.stride()[1:]) >= _FARTHEST:
        t = t.contiguous()
    return t, Strides(*t.stride())


def _forward(find_launch, options, w, u, k, v, state=None, last=None) -> Tensor:
    """``find_launch`` takes what describes the maps, and ``options``."""
    (k, of_k), (v, of_v) = _map(k), _map(v)
    w, u = w.contiguous(), u.contiguous()
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch = find_launch(v.get_device(), Types(v.dtype, w.dtype, u.dtype), Sizes(*v.shape), of_k,
                         of_v, *options)
    memory = v.new_empty(launch.memory, dtype=torch.uint8) if launch.memory else None
    launch.run(k=k.data_ptr(), v=v.data_ptr(), w=w.data_ptr(), u=u.data_ptr(), y=y.data_ptr(),
               memory=pointer(memory), start=pointer(state), last=pointer(last))
    return y


def _backward(find_launch, options, grad, w, u, k, v, state=None, grad_last=None):
    """Gradients by w, u, k, v and the state, fp32; ``find_launch`` as for :func:`_forward`."""
    dtype = v.dtype
    dy = torch.zeros(v.shape, dtype=dtype, device=v.device) if grad is None else grad.to(dtype)
    (k, of_k), (v, of_v), (dy, of_dy) = _map(k), _map(v), _map(dy)
    w, u = w.contiguous(), u.contiguous()
    dk, dv = (torch.empty(v.shape, dtype=dtype, device=v.device) for _ in range(2))
    dw, du = torch.empty_like(w), torch.empty_like(u)
    dstate = None if state is None else torch.empty_like(state)
    launch = find_launch(v.get_device(), Types(dtype, w.dtype, u.dtype), Sizes(*v.shape), of_k,
                         of_v, of_dy, *options)
    memory = v.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(k=k.data_ptr(), v=v.data_ptr(), dy=dy.data_ptr(), w=w.data_ptr(), u=u.data_ptr(),
               dk=dk.data_ptr(), dv=dv.data_ptr(), dw=dw.data_ptr(), du=du.data_ptr(),
               memory=memory.data_ptr(), start=pointer(state), dstart=pointer(dstate),
               dlast=pointer(grad_last))
    return dw, du, dk, dv, dstate


def _as_state(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def forward(w, u, k, v, state, return_state) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.wkv`; the second result is empty without
    ``return_state``."""
    batch, _, channels = v.shape
    last = torch.empty((batch, 3, channels) if return_state else 0, dtype=torch.float32,
                       device=v.device)
    y = _forward(launches.forward_launch, (True,), w, u, k, v, _as_state(state),
                 last if return_state else None)
    return y, last


def backward(grad, grad_final, w, u, k, v, state, return_state):
    """Gradients by w, u, k, v and the state (None where there is none)."""
    *grads, dstate = _backward(launches.backward_launch, (True,), grad, w, u, k, v,
                               _as_state(state), _as_state(grad_final) if return_state else None)
    return *grads, None if state is None else dstate.to(state.dtype)


def bi_forward(w, u, k, v, blocks, eps) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.bi_wkv`."""
    if blocks:
        return _forward(launches.official_forward_launch, (blocks, eps), w, u, k, v)
    return _forward(launches.forward_launch, (False,), w, u, k, v)


def bi_backward(grad, w, u, k, v, blocks, eps):
    """Gradients by w, u, k and v."""
    if blocks:
        return _backward(launches.official_backward_launch, (blocks, eps), grad, w, u, k, v)[:4]
    return _backward(launches.backward_launch, (False,), grad, w, u, k, v)[:4]
