"""``linear_attention`` for any device, by matrix products over all tokens.

Features, weights of tokens and denominators are in fp32; the products have operands in the dtype of
the map, with sums in fp32. The weights of all tokens sum to 1, so the state is a mean and stays
within the range of fp16 whatever the size of the map; but a single weight may be as small as 1 / L,
or be 1, so keys of fp16 carry the square root of L and the product with the values takes it away.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype, without_autocast
from vmamba_mm.ops.rotation import rotate_heads


def _features(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """elu(x) + 1, and its derivative, which is the same below 0 and 1 above."""
    x = x.to(dtype)
    slope = x.clamp(max=0).exp()
    return slope + x.relu(), slope


def _turned_back(x: Tensor, turns: Tensor | None) -> Tensor:
    return rotate_heads(x, None if turns is None else turns * turns.new_tensor((1, -1)))


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, n, P) to (B n, L, P), for batches of products."""
    return x.to(dtype).transpose(1, 2).flatten(0, 1)


def _by_token(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_by_head`, for tokens of the sizes of ``like`` (B, L, n, ...)."""
    batch, length, heads, _ = like.shape
    return x.view(batch, heads, length, x.shape[2]).transpose(1, 2).to(dtype)


def _product(a: Tensor, b: Tensor, scale: float | None = None) -> Tensor:
    """``scale * a @ b`` of batches of matrices, scaled before it is rounded."""
    if scale is None:
        return a @ b
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _weigh(f: Tensor, g: Tensor, augmented: bool) -> Tensor | float:
    """The weights of the tokens, (B, L, n, 1): a softmax of their scores against the mean query,
    or 1 / L for all of them.

    Args:
        f, g: features of queries and keys, (B, L, n, P).
    """
    if not augmented:
        return 1 / g.shape[1]
    scores = (f.mean(1, keepdim=True) * g).sum(-1, keepdim=True)
    return (scores * g.shape[-1] ** -0.5).softmax(1)


def _scale_of(length: int, dtype: torch.dtype) -> float | None:
    """What the state is multiplied by, and its keys are divided by; None where nothing need be."""
    return 1 / torch.sym_sqrt(length) if dtype == torch.float16 else None


def _unscaled(x: Tensor | float, scale: float | None) -> Tensor | float:
    return x if scale is None else x / scale


def _find_state(f, g, v, turns, weights, scale) -> tuple[Tensor, ...]:
    """What forward and backward share: queries and keys (B n, L, P) and values (B n, L, E) of the
    products, the turned keys before their weights (B, L, n, P), the state (B n, P, E), the sum of
    the keys (B, 1, n, P), and the denominators (B, L, n, 1) without eps."""
    turned = rotate_heads(g, turns)
    left, right, values = (_by_head(t, v.dtype) for t in (
        rotate_heads(f, turns), turned * _unscaled(weights, scale), v))
    total = (g * weights).sum(1, keepdim=True)
    state = _product(right.mT, values, scale)
    return left, right, values, turned, state, total, (f * total).sum(-1, keepdim=True)


def forward(q, k, v, turns, augmented, eps) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.linear_attention`."""
    dtype, scale = compute_dtype(v.dtype), _scale_of(v.shape[1], v.dtype)
    (f, _), (g, _) = _features(q, dtype), _features(k, dtype)
    weights = _weigh(f, g, augmented)
    left, _, _, _, state, _, denominators = _find_state(f, g, v, turns, weights, scale)
    y = _by_token(_product(left, state), v, dtype)
    return (y / (denominators + eps)).to(v.dtype).contiguous()


def backward(grad, q, k, v, turns, augmented, eps):
    """Gradients by q, k and v."""
    dtype, scale = compute_dtype(v.dtype), _scale_of(v.shape[1], v.dtype)
    (f, slope_f), (g, slope_g) = _features(q, dtype), _features(k, dtype)
    weights = _weigh(f, g, augmented)
    left, right, values, turned, state, total, denominators = _find_state(
        f, g, v, turns, weights, scale)
    denominators = denominators + eps
    grad = grad.to(dtype) / denominators
    grads = _by_head(grad, v.dtype)
    # Of a sum over tokens: scaled, as the keys are.
    grad_state = _product(left.mT, grads, scale)
    grad_v = _by_token(_product(right, grad_state), v, v.dtype).contiguous()
    y = _by_token(_product(left, state), v, dtype) / denominators
    by_denominators = -(grad * y).sum(-1, keepdim=True)
    by_total = (by_denominators * f).sum(1, keepdim=True)
    grad_f = _turned_back(_by_token(_product(grads, state.mT), q, dtype), turns)
    grad_f = grad_f + by_denominators * total
    # By the turned keys with their weights.
    by_keys = _unscaled(_by_token(_product(values, grad_state.mT), k, dtype), scale)
    grad_g = _turned_back(by_keys * weights, turns) + by_total * weights
    if augmented:
        by_weights = (by_keys * turned + by_total * g).sum(-1, keepdim=True)
        by_scores = weights * (by_weights - (weights * by_weights).sum(1, keepdim=True))
        by_scores = by_scores * g.shape[-1] ** -0.5
        grad_g = grad_g + by_scores * f.mean(1, keepdim=True)
        grad_f = grad_f + (by_scores * g).sum(1, keepdim=True) / f.shape[1]
    return ((grad_f * slope_f).to(q.dtype).contiguous(),
            (grad_g * slope_g).to(k.dtype).contiguous(), grad_v)


def compose(*args) -> Tensor:
    """The forward for compilers, which fuse what is around the products, forward and backward."""
    with without_autocast(args[2]):
        return forward(*args)
