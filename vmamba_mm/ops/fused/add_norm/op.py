"""LayerNorm over the last dimension, and the residual sum before it, in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype, wants_grad
from vmamba_mm.ops.core.registration import register
from vmamba_mm.ops.fused.add_norm import cuda


def _bwd_fake(grad, x, moments, weight, bias, others, scale, branch_dtype):
    dbranch = x.new_empty(x.shape if branch_dtype else (0,), dtype=branch_dtype or x.dtype)
    return x.new_empty(x.shape), dbranch, torch.empty_like(weight), torch.empty_like(bias)


@register('add_norm_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor,
         others: Tensor | None, scale: Tensor | None, branch_dtype: torch.dtype | None
         ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the norm's input (``others`` added), times ``scale`` by the branch (empty if
    ``branch_dtype`` is None), and by weight and bias."""
    return cuda.backward(grad, x, moments, weight, bias, others, scale, branch_dtype)


def _setup_context(ctx, inputs, output):
    x, branch, scale, weight, bias, *_ = inputs
    total, _, moments = output
    ctx.x_dtype, ctx.branch_dtype = x.dtype, None if branch is None else branch.dtype
    if weight is None:
        ctx.save_for_backward(scale)
    else:
        ctx.save_for_backward(scale, x if branch is None else total, moments, weight, bias)


def _backward(ctx, grad_sum, grad_normed):
    scale, *saved = ctx.saved_tensors
    if grad_normed is None or not saved:
        dbranch = None
        if ctx.branch_dtype is not None and grad_sum is not None:
            dbranch = cuda.scaled(grad_sum, scale, ctx.branch_dtype)
        return None if grad_sum is None else grad_sum.to(ctx.x_dtype), dbranch, *[None] * 6
    dx, dbranch, dweight, dbias = _bwd(grad_normed, *saved, grad_sum, scale, ctx.branch_dtype)
    return (dx, None if ctx.branch_dtype is None else dbranch, None, dweight, dbias,
            None, None, None)


def _fwd_fake(x, branch, scale, weight, bias, eps, out_dtype, save):
    sum_dtype = out_dtype if weight is None else x.dtype
    return (x.new_empty(x.shape if branch is not None else (0,), dtype=sum_dtype),
            x.new_empty(x.shape if weight is not None else (0,), dtype=out_dtype),
            x.new_empty((x.numel() // x.shape[-1] if save and weight is not None else 0, 2),
                        dtype=torch.float32))


@register('add_norm', fake=_fwd_fake, backward=_backward, setup_context=_setup_context, results=2)
def _fwd(x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor | None,
         bias: Tensor | None, eps: float, out_dtype: torch.dtype, save: bool
         ) -> tuple[Tensor, Tensor, Tensor]:
    """(x + scale branch, its norm, moments); empty is what was not asked for."""
    total, normed, moments = cuda.forward(x, branch, scale, weight, bias, eps, out_dtype, save)
    return (x.new_empty(0) if total is None else total,
            x.new_empty(0, dtype=out_dtype) if normed is None else normed,
            x.new_empty((0, 2), dtype=torch.float32) if moments is None else moments)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
               out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension, computed in fp32 and rounded once.

    Args:
        x: (B, ..., D).
        weight, bias: (D).
        eps: added to the variance.
        out_dtype: of the result; None for ``x``'s, or fp32 under autocast.
    """
    out_dtype = out_dtype or _default_dtype(x)
    if cuda.why_not(x, weight, bias) is not None:
        return _norm(x, weight, bias, eps).to(out_dtype)
    return _fwd(x, None, None, weight, bias, eps, out_dtype, wants_grad(x, weight, bias))[1]


def add_norm(x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None,
             eps: float = 1e-5, *, scale: Tensor | None = None,
             out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """A residual sum and the LayerNorm that follows it.

    Args:
        x: (B, ..., D), of which the sum before a norm has the dtype.
        branch: (B, ..., D).
        weight, bias: (D); None for no norm.
        scale: (B), fp32: a factor for each sample of ``branch`` (stochastic depth); None for 1.
        eps: as in :func:`layer_norm`.
        out_dtype: as there; without a norm the dtype of the sum, None for that of ``x``.

    Returns:
        (x + scale * branch, its norm or None).
    """
    out_dtype = out_dtype or (x.dtype if weight is None else _default_dtype(x))
    if cuda.why_not(x, branch, weight, bias) is not None:
        if scale is not None:
            branch = branch * scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
        total = x + branch
        if weight is None:
            return total.to(out_dtype), None
        return total.to(x.dtype), _norm(total, weight, bias, eps).to(out_dtype)
    save = weight is not None and wants_grad(x, branch, weight, bias)
    total, normed, _ = _fwd(x, branch, scale, weight, bias, eps, out_dtype, save)
    return total, None if weight is None else normed


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if torch.promote_types(x.dtype, weight.dtype) == x.dtype:  # F.layer_norm takes no smaller one
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _default_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if autocast_dtype(x) is None else torch.float32
