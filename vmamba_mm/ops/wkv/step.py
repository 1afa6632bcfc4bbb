"""One token of ``wkv``, for decoding."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.wkv import reference


def wkv_step(state: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One more token of :func:`vmamba_mm.ops.wkv`, in plain PyTorch on any device.

    Args:
        state: (B, 3, C), fp32 (fp64 for fp64 ``v``), the state before this token; of no token, 0,
            0 and -inf.
        w, u: (C), as of ``wkv``.
        k, v: (B, C).

    Returns:
        y (B, C) in the dtype of ``v``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> state = torch.zeros(2, 3, 8)
        >>> state[:, 2] = -torch.inf
        >>> y, state = wkv_step(state, torch.zeros(8), torch.zeros(8), *torch.randn(2, 2, 8))
        >>> y.shape, state.shape
        (torch.Size([2, 8]), torch.Size([2, 3, 8]))
    """
    if v.dim() != 2:
        raise ValueError(f'wkv_step expects v (B, C), got {tuple(v.shape)}')
    batch, channels = v.shape
    check_shapes('wkv_step', {'v': v}, state=(state, (batch, 3, channels)), w=(w, (channels,)),
                 u=(u, (channels,)), k=(k, v.shape))
    dtype = compute_dtype(v.dtype)
    w, u, keys, values, state = (t.to(dtype) for t in (w, u, k, v, state))
    y, parts = reference.step(w.exp(), u, keys, values, state.unbind(1))
    return y.to(v.dtype), torch.stack(parts, 1)
