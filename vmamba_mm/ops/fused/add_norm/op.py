"""The op ``add_norm``: LayerNorm or RMSNorm over the last dimension, and the residual sum before
it, in one pass. Its definition and the public functions."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.calls import register
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.add_norm import cuda, reference


def _bwd_fake(grad, x, moments, weight, bias, extra_grad, scale, branch_dtype):
    dbranch = x.new_empty(x.shape if branch_dtype else (0,), dtype=branch_dtype or x.dtype)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), dbranch, torch.empty_like(weight), dbias


# Gradients by the norm's input (``extra_grad`` added), times ``scale`` by the branch (empty if
# ``branch_dtype`` is None), and by weight and bias.
_bwd = register(
    'add_norm_bwd',
    '(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor? bias, Tensor? extra_grad, '
    'Tensor? scale, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)',
    cuda.backward, fake=_bwd_fake)


def _setup_context(ctx, inputs, output):
    x, branch, scale, weight, bias, *_ = inputs
    total, _, moments = output
    ctx.x_dtype, ctx.branch_dtype = x.dtype, None if branch is None else branch.dtype
    # Either the input or the sum is kept, never both.
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
    return (dx, None if ctx.branch_dtype is None else dbranch, None, dweight,
            None if saved[-1] is None else dbias,
            None, None, None)


def _fake(x, branch, scale, weight, bias, eps, out_dtype, save):
    sum_dtype = out_dtype if weight is None else x.dtype
    return (x.new_empty(x.shape if branch is not None else (0,), dtype=sum_dtype),
            x.new_empty(x.shape if weight is not None else (0,), dtype=out_dtype),
            x.new_empty((x.numel() // x.shape[-1] if save and weight is not None else 0, 2),
                        dtype=torch.float32))


def _forward(x, branch, scale, weight, bias, eps, out_dtype, save):
    """(x + scale branch, its norm, moments); empty is what was not asked for."""
    total, normed, moments = cuda.forward(x, branch, scale, weight, bias, eps, out_dtype, save)
    return (x.new_empty(0) if total is None else total,
            x.new_empty(0, dtype=out_dtype) if normed is None else normed,
            x.new_empty((0, 2), dtype=torch.float32) if moments is None else moments)


_add_norm = define_op(
    'add_norm',
    '(Tensor x, Tensor? branch, Tensor? scale, Tensor? weight, Tensor? bias, float eps, '
    'ScalarType out_dtype, bool save) -> (Tensor total, Tensor normed, Tensor moments)',
    reference=reference.add_norm,
    fake=_fake,
    implementations={'cuda': Implementation(
        _forward, saves=lambda x, branch, scale, weight, *_: weight is not None,
        why_not=lambda x, branch, scale, weight, bias, *_: cuda.why_not(x, branch, weight, bias))},
    results=2,
    no_grad='scale',
    setup_context=_setup_context,
    backward=_backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
               out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last dimension, computed in fp32 and rounded once.

    Args:
        x: (B, ..., D).
        weight, bias: (D).
        eps: added to the variance.
        out_dtype: of the result; None for ``x``'s, or fp32 under autocast.

    Returns:
        (B, ..., D).

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x = torch.tensor([[1., 3.]])
        >>> layer_norm(x, torch.ones(2), torch.zeros(2))
        tensor([[-1.0000,  1.0000]])
    """
    _check(x, None, weight, bias)
    return _add_norm(x, None, None, weight, bias, eps, out_dtype or _default_dtype(x))[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *,
             out_dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, computed in fp32 and rounded once.

    Args:
        x: (B, ..., D).
        weight: (D).
        eps: added to the mean square.
        out_dtype: as in :func:`layer_norm`.

    Returns:
        (B, ..., D).

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> rms_norm(torch.tensor([[1., 7.]]), torch.ones(2))
        tensor([[0.2000, 1.4000]])
    """
    _check(x, None, weight, None)
    return _add_norm(x, None, None, weight, None, eps, out_dtype or _default_dtype(x))[1]


def add_norm(x: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None,
             eps: float = 1e-5, *, scale: Tensor | None = None,
             out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """A residual sum and the LayerNorm or RMSNorm that follows it.

    Args:
        x: (B, ..., D), of which the sum before a norm has the dtype.
        branch: (B, ..., D).
        weight, bias: (D), of a LayerNorm; weight alone, of an RMSNorm; None for no norm.
        scale: (B), fp32: a factor for each sample of ``branch`` (stochastic depth); None for 1.
        eps: as in :func:`layer_norm`.
        out_dtype: as there; without a norm the dtype of the sum, None for that of ``x``.

    Returns:
        (x + scale * branch, its norm or None).

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x, branch = torch.tensor([[1., 2.]]), torch.tensor([[0., 1.]])
        >>> add_norm(x, branch, torch.ones(2), torch.zeros(2))
        (tensor([[1., 3.]]), tensor([[-1.0000,  1.0000]]))
    """
    _check(x, branch, weight, bias, scale)
    out_dtype = out_dtype or (x.dtype if weight is None else _default_dtype(x))
    total, normed = _add_norm(x, branch, scale, weight, bias, eps, out_dtype)
    return total, None if weight is None else normed


def _check(x, branch, weight, bias, scale=None) -> None:
    dim = x.shape[-1:]
    if (branch is None or branch.shape == x.shape) and (
            scale is None or scale.shape == x.shape[:1]) and (
            bias is None if weight is None
            else weight.shape == dim and (bias is None or bias.shape == dim)):
        return
    if weight is None and bias is not None:
        raise ValueError('a norm needs a weight beside its bias, or neither for no norm')
    check_shapes('a norm', {'x': x}, branch=(branch, x.shape), weight=(weight, dim),
                 bias=(bias, dim), scale=(scale, x.shape[:1]))


def _default_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if autocast_dtype(x) is None else torch.float32
