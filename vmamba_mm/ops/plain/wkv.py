"""The ops of RWKV in plain PyTorch. Arguments and results as of the ops' references.

B batch, T tokens, C channels; H heads of N channels of keys and P of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.plain.recurrence import LOW, scan_carries, scan_means


class _Sums:
    """The sums of values and of weights over ``exp(top)``, and their factor."""

    def __init__(self, values: Tensor, weights: Tensor, top: Tensor, factor: Tensor | float = 1.0):
        self.values, self.weights, self.top, self.factor = values, weights, top, factor

    def later(self, exponent: Tensor) -> '_Sums':
        return _Sums(self.values, self.weights, self.top - exponent, self.factor)


def _mean(parts: list[_Sums], top: Tensor, eps: float = 0.0) -> Tensor:
    values = weights = 0
    for part in parts:
        scale = (part.top - top).exp() * part.factor
        values, weights = values + scale * part.values, weights + scale * part.weights
    return values / (weights + eps)


def _highest(*tops: Tensor) -> Tensor:
    highest = tops[0]
    for top in tops[1:]:
        highest = torch.maximum(highest, top)
    return highest


def _in_time(*tensors: Tensor) -> list[Tensor]:
    """(B, T, ...) to (T, B, ...), in the dtype of the computation."""
    return [t.to(compute_dtype(t.dtype)).transpose(0, 1) for t in tensors]


def wkv(w, u, k, v, state, return_state) -> tuple[Tensor, Tensor | None]:
    if state is not None or return_state:
        raise NotImplementedError('wkv with a state has no form for other runtimes')
    dtype = v.dtype
    k, v = _in_time(k, v)
    before = _Sums(*scan_means(w.to(k.dtype).exp(), k, v, 0, False))
    own = u.to(k.dtype) + k
    top = torch.maximum(before.top, own)
    y = _mean([before, _Sums(v, 1.0, own)], top)
    return y.transpose(0, 1).to(dtype), None


def bi_wkv(w, u, k, v, blocks, eps) -> Tensor:
    dtype = v.dtype
    k, v = _in_time(k, v)
    w, u = w.to(k.dtype), u.to(k.dtype)
    before, after = (_Sums(*scan_means(w, k, v, 0, reverse)) for reverse in (False, True))
    own = _Sums(v, 1.0, u + k)
    if blocks:
        y = _official(w, k, v, own, before, after, blocks, eps)
    else:
        y = _mean([before, after, own], _highest(before.top, after.top, own.top))
    return y.transpose(0, 1).to(dtype)


def _official(w, k, v, own, before, after, blocks, eps) -> Tensor:
    """As the official kernel has it; ``vmamba_mm.ops.wkv.reference`` says what that is."""
    length = k.shape[0]
    size = (length + blocks - 1) // blocks
    missing = (-length) % size

    def in_blocks(x, value=0.0):  # (T, B, C) to (blocks, size, B, C)
        return F.pad(x, (0, 0, 0, 0, 0, missing), value=value).unflatten(0, (-1, size))

    def in_order(x):
        return x.flatten(0, 1)[:length]

    keys, values = in_blocks(k, LOW), in_blocks(v)
    offset = torch.arange(size, device=k.device, dtype=k.dtype)[:, None, None]
    local = _Sums(*map(in_order, scan_means(w, keys, values, 1, False)))
    # What came before a block is what the first of its tokens sees.
    carry = _Sums(*(in_order(in_blocks(part)[:, :1].expand_as(keys))
                    for part in (before.values, before.weights)),
                  in_order(in_blocks(before.top, LOW)[:, :1] - offset * w))
    first = in_order(keys[:, :1] + offset * w)
    # Tokens of a block but its first grow from one to the next.
    growing = torch.where(offset == 0, LOW, keys)
    again = _Sums(*map(in_order, scan_means(-w, growing, values, 1, False)),
                  factor=-torch.expm1(w)).later(-w)
    itself = _Sums(v, 1.0, in_order(growing), again.factor)
    grown = torch.maximum(again.top, itself.top)
    carry, after = carry.later(w), after.later(w)
    top = _highest(own.top, local.top, carry.top, after.top, first, grown, grown + w)
    return _mean([local, carry, after, again, itself, own], top, eps)


def wkv6(r, k, v, w, u, initial_state, return_final_state) -> tuple[Tensor, Tensor | None]:
    if initial_state is not None or return_final_state:
        raise NotImplementedError('wkv6 with a state has no form for other runtimes')
    dtype = r.dtype
    r, k, v, w = _in_time(r, k, v, w)
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    before = scan_carries((-w.exp()).exp().unsqueeze(-1), new, 0, False)
    y = (r.unsqueeze(-2) @ (before + u.to(r.dtype).unsqueeze(-1) * new)).squeeze(-2)
    return y.transpose(0, 1).to(dtype), None
