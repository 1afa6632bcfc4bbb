"""One token of ``retention``, for decoding."""

from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.retention.op import check_state


def retention_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor
                   ) -> tuple[Tensor, Tensor]:
    """One more token of :func:`vmamba_mm.ops.retention`, in plain PyTorch on any device.

    Args:
        state: (B, H, P, N), fp32 (fp64 for fp64 ``v``), the state before this token.
        q, k: (B, H, N).
        v: (B, H, P).
        log_decay: (H).

    Returns:
        y (B, H, P) in the dtype of ``v``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.
    """
    if q.dim() != 3 or q.shape != k.shape or v.shape[:2] != q.shape[:2] or v.dim() != 3:
        raise ValueError('retention_step expects q and k (B, H, N) and v (B, H, P); got '
                         f'{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}')
    check_state('retention_step', q, v, log_decay, state)
    dtype = compute_dtype(v.dtype)
    gamma = log_decay.to(dtype).exp()[:, None, None]
    state = gamma * state.to(dtype) + v.to(dtype)[..., None] * k.to(dtype)[:, :, None]
    return (state * q.to(dtype)[:, :, None]).sum(-1).to(v.dtype), state
