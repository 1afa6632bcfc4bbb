"""``wkv`` and ``bi_wkv`` as their equations say, token by token: the specification of the ops.

B batch, T tokens, C channels. Gradients are autograd's; those of ``bi_wkv`` in its official mode
are the published ones, which are not all derivatives of the result.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def step(decay: Tensor, u: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor, Tensor]
         ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One token of RWKV-4 (arXiv 2305.13048, equations 16 and 22 to 29 of its appendix).

    ``a exp(p)`` is the sum of the values seen so far, each times its weight, and ``b exp(p)`` that
    of the weights; p is the largest exponent of a weight, so that none overflows. It is a
    constant for gradients: what it divides by cancels.

    Args:
        decay, u: (C), of the exponent from token to token, and the bonus of the current one.
        k, v: (B, C).
        state: a, b and p, each (B, C).

    Returns:
        y (B, C), and the new state.
    """
    a, b, p = state
    top = torch.maximum(p, u + k).detach()
    past, now = (p - top).exp(), (u + k - top).exp()
    y = (past * a + now * v) / (past * b + now)
    top = torch.maximum(p - decay, k).detach()
    past, now = (p - decay - top).exp(), (k - top).exp()
    return y, (past * a + now * v, past * b + now, top)


def forward(w, u, k, v, state, return_state) -> tuple[Tensor, Tensor | None]:
    """Causal. Shapes as in :func:`vmamba_mm.ops.wkv`."""
    dtype, (batch, length, channels) = compute_dtype(v.dtype), v.shape
    decay, u, keys, values = w.to(dtype).exp(), u.to(dtype), k.to(dtype), v.to(dtype)
    if state is None:
        zeros = values.new_zeros(batch, channels)
        parts = zeros, zeros, zeros - torch.inf
    else:
        parts = state.to(dtype).unbind(1)
    outputs = []
    for t in range(length):
        y, parts = step(decay, u, keys[:, t], values[:, t], parts)
        outputs.append(y)
    final = torch.stack(parts, 1) if return_state else None
    return torch.stack(outputs, 1).to(v.dtype), final


def bi_forward(w, u, k, v, blocks, eps) -> Tensor:
    """Of both directions. Shapes as in :func:`vmamba_mm.ops.bi_wkv`; ``blocks`` is 0 for the
    formula of the paper."""
    out_dtype, length = v.dtype, v.shape[1]
    w, u, k, v = (t.to(compute_dtype(out_dtype)) for t in (w, u, k, v))
    if blocks:
        size = -(-length // blocks)
        outputs = [_official(w, u, k, v, t, t // size * size, eps) for t in range(length)]
    else:
        outputs = [_paper(w, u, k, v, t) for t in range(length)]
    return torch.stack(outputs, 1).to(out_dtype)


def _paper_exponents(w, u, k, t) -> Tensor:
    """The logarithm of the weight of each token in output t, (B, T, C): equation 4 of Vision-RWKV
    (arXiv 2403.02308)."""
    index = torch.arange(k.shape[1], device=k.device)[:, None]
    far = k - ((index - t).abs() - 1) * w
    return torch.where(index == t, k + u, far)


def _paper(w, u, k, v, t) -> Tensor:
    return (_paper_exponents(w, u, k, t).softmax(1) * v).sum(1)


def _official(w, u, k, v, t, start, eps) -> Tensor:
    """Output t, (B, C), as the official kernel has it; its block of tokens begins at ``start``.

    Tokens of earlier blocks and later tokens have one decay more than in the paper, and every token
    of the block up to t but the first comes in once more, by ``(1 - e^w) e^(k + w (t - j))``.
    """
    index = torch.arange(k.shape[1], device=k.device)[:, None]
    distance = (index - t).abs()

    def find(w, u, k, v):
        far = k - torch.where((index >= start) & (index < t), distance - 1, distance) * w
        exponents = torch.where(index == t, k + u, far)
        again = k[:, start + 1:t + 1] + (t - index[start + 1:t + 1]) * w
        # The kernel's own: eps counts beside what is divided by it.
        tops = [exponents.amax(1), (k - (index - t) * w)[:, start:].amax(1)]
        if start < t:
            tops.append((again + w).amax(1))
        top = torch.stack(tops).amax(0).detach()
        weights, again = (exponents - top[:, None]).exp(), (again - top[:, None]).exp()
        factor = -torch.expm1(w)
        numerator = (weights * v).sum(1) + factor * (again * v[:, start + 1:t + 1]).sum(1)
        denominator = weights.sum(1) + factor * again.sum(1) + eps
        return numerator / denominator, top, denominator

    y, top, denominator = find(w, u, k.detach(), v.detach())
    # The published gradients by k and v are those of the paper's weights over these denominators.
    exponents = _paper_exponents(w.detach(), u.detach(), k, t)
    weights = (exponents - top[:, None]).exp() / denominator.detach()[:, None]
    for_gradients = (weights * (v - y.detach()[:, None])).sum(1)
    return y + (for_gradients - for_gradients.detach())
