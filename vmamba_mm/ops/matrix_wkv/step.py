"""One token of ``wkv6`` and of ``wkv7``, for decoding."""

from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.matrix_wkv.checks import check
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
    check('wkv6_step', 'BH', r, v, dict(k=k, w=w), u, state=state)
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
    check('wkv7_step', 'BH', r, v, dict(w=w, k=k, a=a, b=b), state=state)
    return _run(step_wkv7, state, r, w, k, v, a, b)


def _run(step, state, *tensors):
    # Products and sums alone, which autocast leaves as they are.
    dtype = compute_dtype(tensors[0].dtype)
    y, state = step(state.to(dtype), *(t.to(dtype) for t in tensors))
    return y.to(tensors[0].dtype), state
