"""``nc_ssd`` for any device, by matrix products over all tokens.

The heads of a group share B and C, so all of them go into one product: a map (B, L, H, P) is, group
by group, a matrix (L, H/G P) of a sample. With one group, as every published model has, no tensor
is moved for that. Products are in the dtype of the map, with sums in fp32, and the weights of the
tokens in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype, without_autocast
from vmamba_mm.ops.selective_scan.activations import softplus


def _find_weights(dt, A, dt_bias, dt_softplus) -> tuple[Tensor, Tensor, Tensor]:
    """(step A, step, raw), each (B, L, H) in the compute dtype, where step is that of ``raw``."""
    dtype = compute_dtype(dt.dtype)
    raw = dt.to(dtype) if dt_bias is None else dt + dt_bias.to(dtype)
    step = softplus(raw) if dt_softplus else raw
    return step * A.to(dtype), step, raw


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, L, H, ...) to (B G, L, H/G ...): head h is of group h mod G."""
    if groups > 1:
        x = x.unflatten(2, (-1, groups)).movedim(3, 1).flatten(0, 1)
    return x.flatten(2)


def _by_head(x: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """The inverse, to the given shape (B, L, H, ...), without gaps."""
    if groups == 1:
        return x.view(shape)
    batch, length, heads, *last = shape
    x = x.view(batch, groups, length, heads // groups, *last)
    return x.movedim(1, 3).reshape(shape).contiguous()


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """``x * factors`` in the dtype of ``x``, rounded once and in one launch."""
    return torch.mul(x, factors, out=x.new_empty(x.shape))


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * a @ b`` of batches of matrices, in one launch."""
    y = a.new_empty(len(a), a.shape[1], b.shape[2])
    return y.baddbmm_(a, b, beta=0, alpha=scale)


def scale_of(length: int, dtype: torch.dtype) -> float:
    """A power of two that keeps sums over so many tokens within the range of fp16."""
    return 2.0 ** -(length.bit_length() // 2) if dtype == torch.float16 else 1.0


def forward(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.nc_ssd`."""
    groups, scale, sign = B.shape[2], scale_of(x.shape[1], x.dtype), -1 if positive else 1
    weights, _, _ = _find_weights(dt, A, dt_bias, dt_softplus)
    values = _by_group(_scaled(x, weights[..., None]), groups)
    state = _product(_by_group(B, groups).mT, values, sign * scale)  # (B G, N, H/G P)
    queries = _by_group(C, groups)
    if D is None:
        y = _product(queries, state, 1 / scale)
    else:
        y = _by_group(_scaled(x, D[:, None]), groups).baddbmm_(queries, state, alpha=1 / scale)
    return _by_head(y, x.shape, groups)


def backward(grad, x, dt, A, B, C, D, dt_bias, dt_softplus, positive):
    """Gradients by x, dt, A, B, C, D and dt_bias (None where there is none)."""
    groups, scale, sign = B.shape[2], scale_of(x.shape[1], x.dtype), -1 if positive else 1
    dtype = compute_dtype(x.dtype)
    weights, step, raw = _find_weights(dt, A, dt_bias, dt_softplus)
    values = _by_group(_scaled(x, weights[..., None]), groups)
    keys, queries, grads = (_by_group(t, groups) for t in (B, C, grad))
    # Both with the sign of the weights, which are without it here.
    state, grad_state = (_product(a.mT, b, sign * scale)
                         for a, b in ((keys, values), (queries, grads)))
    grad_C = _product(grads, state.mT, 1 / scale)
    grad_B = _product(values, grad_state.mT, 1 / scale)
    grad_values = _by_head(_product(keys, grad_state, 1 / scale), x.shape, groups).to(dtype)
    grad_weights = (grad_values * x).sum(-1)
    grad_x = grad_values.mul_(weights[..., None])
    grad_D = None
    if D is not None:
        grad_x.addcmul_(grad.to(dtype), D.to(dtype)[:, None])
        grad_D = (grad.to(dtype) * x).sum((0, 1, 3)).to(D.dtype)
    grad_A = (grad_weights * step).sum((0, 1)).to(A.dtype)
    grad_dt = grad_weights.mul_(A.to(dtype))
    if dt_softplus:
        grad_dt = torch.ops.aten.softplus_backward(grad_dt, raw, 1, 20)
    grad_bias = None if dt_bias is None else grad_dt.sum((0, 1)).to(dt_bias.dtype)
    return (grad_x.to(x.dtype), grad_dt.to(dt.dtype), grad_A, _by_head(grad_B, B.shape, groups),
            _by_head(grad_C, C.shape, groups), grad_D, grad_bias)


def compose(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> Tensor:
    """The same for compilers, which fuse all that is around the products, forward and backward."""
    dtype, groups = compute_dtype(x.dtype), B.shape[2]
    # Not a power of two, for the number of tokens may be a symbol; it is rounded in fp32 alone.
    scale = 1 / torch.sym_sqrt(x.shape[1]) if x.dtype == torch.float16 else 1.0
    with without_autocast(x):
        raw = dt.to(dtype) if dt_bias is None else dt + dt_bias.to(dtype)
        step = F.softplus(raw) if dt_softplus else raw
        weights = step * A.to(dtype) * (-scale if positive else scale)
        values = _by_group((x * weights[..., None]).to(x.dtype), groups)
        y = _by_group(C, groups) @ (_by_group(B, groups).mT @ values)
        y = _by_head(y, x.shape, groups).to(dtype) / scale
        if D is not None:
            y = y + x * D.to(dtype)[:, None]
    return y.to(x.dtype)
