"""``mamba_ssm.ops.triton.layer_norm``: the residual sum and the norm behind it.

Sums and norms are calculated in fp32 (fp64 for fp64 input) and not rounded in between. Autocast has
no effect: a result has the dtype of ``x``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.integrations.dropin.inner import cast_for_autocast
from vmamba_mm.ops import add_norm, layer_norm, rms_norm
from vmamba_mm.ops.core.backends import compute_dtype


def layer_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                  x1: Tensor | None = None, weight1: Tensor | None = None,
                  bias1: Tensor | None = None, eps: float = 1e-6, dropout_p: float = 0.0,
                  rowscale: Tensor | None = None, prenorm: bool = False,
                  residual_in_fp32: bool = False, is_rms_norm: bool = False,
                  return_dropout_mask: bool = False):
    """Norm of ``dropout(rowscale * x) + dropout(x1) + residual`` over the last dimension.

    Args:
        x, x1, residual: (..., C); the latter two may be None.
        weight: (C). bias: (C), or None.
        weight1, bias1: (C), of a second norm of the same sum, or None.
        dropout_p: of x and x1.
        rowscale: (...), or None.
        prenorm: also return the sum, in the dtype of ``residual``; without one, in fp32 with
            ``residual_in_fp32``, else in that of ``x``.
        is_rms_norm: RMSNorm in place of LayerNorm.
        return_dropout_mask: also return what was kept of x and of x1 (None without).

    Returns:
        The norm, or a tuple: the norm, the second norm if there is one, then what was asked for.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError('layer_norm_fn takes rowscale or x1, not both')
    dtype = compute_dtype(x.dtype)
    total, mask = _drop(x if rowscale is None else x.to(dtype) * rowscale[..., None], dropout_p)
    other, mask1 = (None, None) if x1 is None else _drop(x1, dropout_p)
    if other is not None:
        total = total.to(dtype) + other
    norms = [(w, b) for w, b in ((weight, bias), (weight1, bias1)) if w is not None]
    results = []
    if residual is not None and residual.dtype == dtype and (bias is None) == is_rms_norm:
        # The usual case, on a GPU one kernel.
        total, normed = add_norm(residual, total, weight, bias, eps, out_dtype=x.dtype)
        results, norms = [normed], norms[1:]
    elif residual is not None:
        total = total.to(dtype) + residual
    results += [_norm(total, w, b, eps, is_rms_norm, x.dtype) for w, b in norms]
    if prenorm:
        results.append(total.to(residual.dtype if residual is not None
                                else torch.float32 if residual_in_fp32 else x.dtype))
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                x1: Tensor | None = None, weight1: Tensor | None = None,
                bias1: Tensor | None = None, eps: float = 1e-6, dropout_p: float = 0.0,
                rowscale: Tensor | None = None, prenorm: bool = False,
                residual_in_fp32: bool = False, return_dropout_mask: bool = False):
    """:func:`layer_norm_fn` with RMSNorm."""
    return layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale,
                         prenorm, residual_in_fp32, True, return_dropout_mask)


def layer_norm_linear_fn(x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
                         linear_weight: Tensor, linear_bias: Tensor | None,
                         residual: Tensor | None = None, eps: float = 1e-6, prenorm: bool = False,
                         residual_in_fp32: bool = False, is_rms_norm: bool = False):
    """:func:`layer_norm_fn` and a linear layer behind it."""
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, eps=eps, prenorm=True,
                             residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm)
    y, linear_weight = cast_for_autocast(y, linear_weight)
    bias = None if linear_bias is None else linear_bias.to(y.dtype)
    y = F.linear(y, linear_weight.to(y.dtype), bias)
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """RMSNorm of the last dimension, with the residual sum before it: see :func:`layer_norm_fn`.

    Args:
        hidden_size: C.
        dropout_p: of x before the sum, in training.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False,
                residual_in_fp32: bool = False):
        p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(x, self.weight, self.bias, residual, eps=self.eps, dropout_p=p,
                           prenorm=prenorm, residual_in_fp32=residual_in_fp32)


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Dropout of ``x`` in fp32, and what it kept."""
    if p == 0:
        return x, None
    mask = torch.rand_like(x, dtype=torch.float32) > p
    return x.to(compute_dtype(x.dtype)) * mask / (1 - p), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool,
          dtype: torch.dtype) -> Tensor:
    """A norm of the last dimension, calculated in fp32 at least."""
    if not is_rms_norm:
        bias = torch.zeros_like(weight) if bias is None else bias
        return layer_norm(x, weight, bias, eps, out_dtype=dtype)
    if bias is None:
        return rms_norm(x, weight, eps, out_dtype=dtype)
    y = rms_norm(x, weight, eps, out_dtype=compute_dtype(x.dtype))
    return (y + bias).to(dtype)
