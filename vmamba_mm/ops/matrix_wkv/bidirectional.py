"""``wkv6`` of both directions, of Vision-RWKV6."""

import torch
from torch import Tensor

from vmamba_mm.ops.matrix_wkv.op import Backend, wkv6


def bi_wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
            backend: Backend | None = None) -> Tensor:
    """The time mixing of RWKV-6 over the tokens before and after each one, of Vision-RWKV's public
    code (``VRWKV6``).

    A head returns ``y_t = r_t (diag(u) k_t v_t^T + sum_i diag(d_ti) k_i v_i^T)`` over all other
    tokens, where ``d_ti`` is the product of the decays ``exp(-exp(w_m))`` of the tokens strictly
    between t and i. That is :func:`vmamba_mm.ops.wkv6`, and the same of the flipped sequence
    without the bonus. Every tensor has a gradient.

    Args:
        r, k, w: (B, T, H, N), fp16, bf16, fp32 or fp64.
        v: (B, T, H, P).
        u: (H, N), the bonus of the token itself.
        backend: as of ``wkv6``.

    Returns:
        (B, T, H, P) in the dtype of ``r``, whatever autocast says.

    Raises:
        ValueError, UserError: as ``wkv6``.

    Example:
        >>> k = torch.randn(2, 50, 4, 8)
        >>> bi_wkv6(k, k, k, k, torch.randn(4, 8)).shape
        torch.Size([2, 50, 4, 8])
    """
    before = wkv6(r, k, v, w, u, backend=backend)
    after = wkv6(*(t.flip(1) for t in (r, k, v, w)), torch.zeros_like(u), backend=backend)
    return before + after.flip(1)
