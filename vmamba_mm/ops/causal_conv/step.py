"""One token of ``causal_conv``, for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def causal_conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
                     silu: bool = True) -> tuple[Tensor, Tensor]:
    """One more position of :func:`vmamba_mm.ops.causal_conv`, in plain PyTorch on any device.

    Args:
        state: (B, W - 1, D), the inputs before this one, oldest first, in the dtype of ``x``.
        x: (B, D).
        weight: (D, W).
        bias: (D), or None.
        silu: whether SiLU follows.

    Returns:
        y (B, D) in the dtype of ``x``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> y, state = causal_conv_step(torch.zeros(1, 2, 4), torch.ones(1, 4), torch.ones(4, 3))
        >>> y.shape, state.shape
        (torch.Size([1, 4]), torch.Size([1, 2, 4]))
    """
    if (x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1]
            or state.shape != (len(x), weight.shape[1] - 1, x.shape[1])
            or bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError('causal_conv_step expects state (B, W - 1, D), x (B, D), weight (D, W) '
                         f'and bias (D) or None; got state {tuple(state.shape)}, x '
                         f'{tuple(x.shape)}, weight {tuple(weight.shape)}'
                         + ('' if bias is None else f', bias {tuple(bias.shape)}'))
    dtype = compute_dtype(x.dtype)
    window = torch.cat((state, x[:, None].to(state.dtype)), dim=1)
    y = (window.to(dtype) * weight.T.to(dtype)).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype), window[:, 1:].contiguous()
