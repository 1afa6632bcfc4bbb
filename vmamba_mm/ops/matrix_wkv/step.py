"""One token of ``wkv6`` and of ``wkv7``, for decoding."""

from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.matrix_wkv.reference import step_wkv6, step_wkv7


def wkv6_step(state: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
              ) -> tuple[Tensor, Tensor]:
    """One more token of :func:`vmamba_mm.ops.wkv6`, in plain PyTorch on any device.

    Args:
        state: (B, H, N, P), fp32 (fp64 for fp64 ``r``), the state before this token.
        r, k, w: (B, H, N).
        v: (B, H, P).
        u: (H, N).

    Returns:
        y (B, H, P) in the dtype of ``r``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> state, k = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8)
        >>> y, state = wkv6_step(state, k, k, k, k, torch.randn(4, 8))
        >>> y.shape, state.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    check('wkv6_step', state, r, v, dict(k=k, w=w), u)
    return _run(step_wkv6, state, r, k, v, w, u)


def wkv7_step(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
              ) -> tuple[Tensor, Tensor]:
    """One more token of :func:`vmamba_mm.ops.wkv7`, in plain PyTorch on any device.

    Args:
        state: (B, H, N, P), fp32 (fp64 for fp64 ``r``), the state before this token.
        r, w, k, a, b: (B, H, N).
        v: (B, H, P).

    Returns:
        y (B, H, P) in the dtype of ``r``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> state, k = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8)
        >>> y, state = wkv7_step(state, k, k, k, k, -k, k.sigmoid())
        >>> y.shape, state.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    check('wkv7_step', state, r, v, dict(w=w, k=k, a=a, b=b))
    return _run(step_wkv7, state, r, w, k, v, a, b)


def _run(step, state, *tensors):
    # Products and sums alone, which autocast leaves as they are.
    dtype = compute_dtype(tensors[0].dtype)
    y, state = step(state.to(dtype), *(t.to(dtype) for t in tensors))
    return y.to(tensors[0].dtype), state


def check(name, state, r, v, like_r, u=None) -> None:
    """Raise ValueError unless the shapes fit one another."""
    if r.dim() != 3 or v.dim() != 3:
        raise ValueError(f'{name} expects r (B, H, N) and v (B, H, P); got r {tuple(r.shape)}, '
                         f'v {tuple(v.shape)}')
    batch, heads, size = r.shape
    expected = {key: (t, r.shape) for key, t in like_r.items()}
    expected |= dict(v=(v, (batch, heads, v.shape[2])), u=(u, (heads, size)),
                     state=(state, (batch, heads, size, v.shape[2])))
    for key, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f'{name} expects {key} of shape {tuple(shape)} beside r '
                             f'{tuple(r.shape)}, got {tuple(tensor.shape)}')
