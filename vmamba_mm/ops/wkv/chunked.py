"""``wkv`` and ``bi_wkv`` for any device: sums over blocks of tokens, forward and backward.

All that the ops need are sums over the tokens before (or after) each one, ``sum_i x_i exp(key_i -
(t - 1 - i) w)``. Such a sum is held as ``exp(top) * sums`` with the largest exponent in it as
``top``, so that no key overflows. Of T tokens in blocks of n, the sums inside the blocks take n
steps, each on all blocks at once, and those over the blocks T / n: about 2 sqrt(T) steps, and time
and memory O(T).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype

#: An exponent below all: in place of minus infinity, of which a difference is NaN.
_LOW = -1e30


class _Sums(NamedTuple):
    """``exp(top) * sums``: the exponent (B, ..., C), and (M, B, ..., C) for M values of a token."""

    top: Tensor
    sums: Tensor

    def times(self, exponent: Tensor) -> Tensor:
        """``exp(exponent) * self``."""
        return (self.top + exponent).exp() * self.sums


def _add(*parts: _Sums) -> _Sums:
    """The sum of sums, over the largest of their exponents."""
    top = parts[0].top
    for part in parts[1:]:
        top = torch.maximum(top, part.top)
    return _Sums(top, sum(part.times(-top) for part in parts))


class _Scan(NamedTuple):
    """Sums over the tokens before each one, and over all."""

    local: _Sums  #: (B, T, C): over those of its block
    through: _Sums  #: (B, T, C): over those and the token itself, as for the token after it
    carry: _Sums  #: (B, T, C): over the blocks before, and what came before the first token
    end: _Sums  #: (B, C): over all, as for a token after the last

    @property
    def all(self) -> _Sums:
        return _add(self.local, self.carry)


def _scan(w: Tensor, keys: Tensor, values: Tensor, size: int | None = None,
          initial: _Sums | None = None, moments: bool = False) -> _Scan:
    """The sums over the tokens before each one, with ``exp(key - (t - 1 - i) w)`` for a weight.

    Args:
        w: (C), of any sign.
        keys: (B, T, C).
        values: (M, B, T, C).
        size: tokens of a block; about sqrt(T) by default.
        initial: what came before the first token, (B, C).
        moments: each value also times its distance ``t - 1 - i``, in M more rows.
    """
    batch, length, channels = keys.shape
    size = size or math.isqrt(length - 1) + 1
    count = -(-length // size)
    last = length - (count - 1) * size  # tokens of the last block
    top = _in_blocks(keys, size, _LOW).clone(memory_format=torch.contiguous_format)
    values = _in_blocks(values, size, 0.0)
    blocks = top.clone()
    for i in range(1, size):
        torch.maximum(top[:, :, i - 1] - w, blocks[:, :, i], out=top[:, :, i])
    sums = values * (blocks - top).exp()
    decays = (top[:, :, :-1] - w - top[:, :, 1:]).exp()
    for i in range(1, size):
        sums[:, :, :, i].addcmul_(sums[:, :, :, i - 1], decays[:, :, i - 1])
    if moments:
        far = torch.zeros_like(sums)
        for i in range(1, size):
            torch.mul(far[:, :, :, i - 1] + sums[:, :, :, i - 1], decays[:, :, i - 1],
                      out=far[:, :, :, i])
        sums = torch.cat((sums, far))
    rows = len(values)

    def carried(before: _Sums, steps: int | Tensor) -> _Sums:
        """Sums, so many tokens later."""
        if not moments:
            return _Sums(before.top - steps * w, before.sums)
        near, far = before.sums.split(rows)
        return _Sums(before.top - steps * w, torch.cat((near.expand_as(far + steps * near),
                                                        far + steps * near)))

    if initial is None:
        initial = _Sums(keys.new_full((batch, channels), _LOW), sums.new_zeros(
            rows, batch, channels))
    if moments:
        initial = initial._replace(sums=torch.cat((initial.sums, 0 * initial.sums)))
    states = [initial]
    for i in range(count):
        steps = size if i + 1 < count else last
        states.append(_add(carried(states[-1], steps),
                              _Sums(top[:, i, steps - 1], sums[:, :, i, steps - 1])))
    before = _Sums(torch.stack([state.top for state in states[:-1]], 1)[:, :, None],
                   torch.stack([state.sums for state in states[:-1]], 2)[:, :, :, None])
    carry = carried(before, torch.arange(size, device=w.device, dtype=w.dtype)[:, None])
    local = _Sums(torch.cat((torch.full_like(top[:, :, :1], _LOW), top[:, :, :-1]), 2),
                  torch.cat((torch.zeros_like(sums[:, :, :, :1]), sums[:, :, :, :-1]), 3))
    local, through, carry = (_Sums(_in_order(part.top, length),
                                   _in_order(part.sums.expand(-1, -1, -1, size, -1), length))
                             for part in (local, _Sums(top, sums), carry))
    return _Scan(local, through, carry, states[-1])


def _in_blocks(x: Tensor, size: int, value: float) -> Tensor:
    """(..., T, C) to (..., blocks, size, C), filled up with ``value``."""
    missing = -x.shape[-2] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=value)
    return x.unflatten(-2, (-1, size))


def _in_order(x: Tensor, length: int) -> Tensor:
    """(..., blocks, size, C) to (..., T, C)."""
    return x.flatten(-3, -2)[..., :length, :]


def _scan_back(w, keys, values, **options) -> _Scan:
    """The sums over the tokens after each one."""
    *parts, end = _scan(w, keys.flip(1), values.flip(2), **options)
    return _Scan(*(_Sums(part.top.flip(1), part.sums.flip(2)) for part in parts), end)


def _with_ones(v: Tensor) -> Tensor:
    """The values of the sums, (2, B, T, C): those of tokens, for numerators, and ones."""
    return torch.stack((v, torch.ones_like(v)))


class _Terms(NamedTuple):
    """What a result consists of, (B, T, C): ``numerator / denominator``, both over ``exp(top)``."""

    numerator: Tensor
    denominator: Tensor
    top: Tensor
    slope: Tensor | None  #: (2, B, T, C): the derivative of the two by w


def _find_terms(parts: list[tuple[_Sums, Tensor | None]], k, u, v, top=None) -> _Terms:
    """Add up the sums and the current token.

    Args:
        parts: sums, and of each, if it has a derivative by w, that derivative over ``exp(top)``.
        top: the exponent; None for the largest of all.
    """
    now = u + k
    if top is None:
        top = torch.stack([now, *(part.top for part, _ in parts)]).amax(0)
    total = (now - top).exp() * _with_ones(v)
    slope = None
    for part, part_slope in parts:
        factor = (part.top - top).exp()
        total = total + factor * part.sums
        if part_slope is not None:
            slope = factor * part_slope + (0 if slope is None else slope)
    return _Terms(*total, top, slope)


def _prepare(*tensors: Tensor) -> list[Tensor]:
    dtype = compute_dtype(tensors[-1].dtype)
    return [t.to(dtype) for t in tensors]


# --- causal -------------------------------------------------------------------------------------

def _causal(decay, u, k, v, state, moments=False) -> tuple[_Terms, _Sums, Tensor | None]:
    """The terms, the state after the last token, and the derivative of that by the decay."""
    initial = None
    if state is not None:
        initial = _Sums(state[:, 2].clamp_min(_LOW), state[:, :2].movedim(1, 0))
    scan = _scan(decay, k, _with_ones(v), initial=initial, moments=moments)
    before, end, slope = scan.all, scan.end, None
    part = before, None
    if moments:
        part = before._replace(sums=before.sums[:2]), -before.sums[2:]
        end, slope = end._replace(sums=end.sums[:2]), -end.sums[2:]
    return _find_terms([part], k, u, v), end, slope


def forward(w, u, k, v, state, return_state) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.wkv`."""
    if not v.numel():
        final = v.new_zeros(len(v), 3, v.shape[2], dtype=compute_dtype(v.dtype))
        return v.new_empty(v.shape), final if return_state else final.new_empty(0)
    dtype = v.dtype
    w, u, k, v = _prepare(w, u, k, v)
    terms, end, _ = _causal(w.exp(), u, k, v, state if state is None else state.to(v.dtype))
    final = torch.stack((*end.sums, end.top), 1) if return_state else v.new_empty(0)
    return (terms.numerator / terms.denominator).to(dtype).contiguous(), final


def backward(grad, grad_final, w, u, k, v, state, return_state):
    """Gradients by w, u, k, v and the state (None where there is none)."""
    like = w, u, k, v, state
    if not v.numel():
        return tuple(t if t is None else torch.zeros_like(t) for t in like)
    w, u, k, v = _prepare(w, u, k, v)
    state = state if state is None else state.to(v.dtype)
    decay = w.exp()
    terms, end, end_slope = _causal(decay, u, k, v, state, moments=True)
    drive = _drive(torch.zeros_like(v) if grad is None else grad.to(v.dtype), terms)
    initial = None
    grad_w = (drive * terms.slope).sum((0, 1, 2))
    if return_state and grad_final is not None:
        of_sums = grad_final[:, :2].movedim(1, 0).to(v.dtype)
        initial = _Sums(-end.top, of_sums)
        grad_w = grad_w + (of_sums * end_slope).sum((0, 1))
    scan = _scan_back(decay, -terms.top, drive, initial=initial)
    grad_u, grad_k, grad_v = _token_gradients(drive, terms, [scan.all], u, k, v)
    grad_state = None
    if state is not None:
        of_a, of_b = scan.end.times(state[:, 2].clamp_min(_LOW))
        grad_state = torch.stack((of_a, of_b, of_a * state[:, 0] + of_b * state[:, 1]), 1)
    return _like((grad_w * decay, grad_u, grad_k, grad_v, grad_state), like)


def _drive(grad, terms: _Terms) -> Tensor:
    """The gradient by numerators and denominators times ``exp(top)``, (2, B, T, C)."""
    by_numerator = grad / terms.denominator
    return torch.stack((by_numerator, -by_numerator * (terms.numerator / terms.denominator)))


def _token_gradients(drive, terms: _Terms, parts: list[_Sums], u, k, v) -> tuple[Tensor, ...]:
    """Gradients by u, k and v, from the sums of ``drive`` over the outputs that read a token."""
    now = (u + k - terms.top).exp() * drive[0]
    # By the exponent of the current token; this difference is zero where it is alone.
    grad_u = now * (v - terms.numerator / terms.denominator)
    grad_k, grad_v = grad_u, now
    for part in parts:
        by_value, by_weight = part.times(k)
        grad_k = grad_k + torch.addcmul(by_weight, v, by_value)
        grad_v = grad_v + by_value
    return grad_u.sum((0, 1)), grad_k, grad_v


def _like(grads, tensors):
    return tuple(grad if grad is None else grad.to(t.dtype).contiguous()
                 for grad, t in zip(grads, tensors, strict=True))


# --- of both directions ---------------------------------------------------------------------------

def _find_both(w, u, k, v, blocks, moments=False) -> _Terms:
    if blocks:
        return _find_official(w, u, k, v, blocks, moments)
    return _find_paper(w, u, k, v, moments)


def _find_paper(w, u, k, v, moments) -> _Terms:
    values, parts = _with_ones(v), []
    for scan in (_scan, _scan_back):
        found = scan(w, k, values, moments=moments).all
        parts.append((found._replace(sums=found.sums[:2]), -found.sums[2:] if moments else None))
    return _find_terms(parts, k, u, v)


def _find_official(w, u, k, v, blocks, moments) -> _Terms:
    """As the official kernel has it; :mod:`vmamba_mm.ops.wkv.reference` says what that is."""
    length, values = v.shape[1], _with_ones(v)
    size = -(-length // blocks)
    before = _scan(w, k, values, size=size, moments=moments)
    after = _scan_back(w, k, values, moments=moments).all
    index = torch.arange(length, device=k.device)
    offset = (index % size)[:, None]  # in the block
    # Tokens of a block but its first grow from one to the next.
    again = _scan(-w, torch.where(offset == 0, _LOW, k), values, size=size, moments=moments).through
    first = k[:, index - offset[:, 0]] + offset * w
    tops = (u + k, before.local.top, before.carry.top - w, after.top - w, first,
            again.top, again.top + w)
    top = torch.stack(torch.broadcast_tensors(*tops)).amax(0)

    def part(sums, decays=0, factor=1.0, slope_factor=None):
        near, far = sums.sums[:2], sums.sums[2:] if moments else None
        found = _Sums(sums.top - decays * w, factor * near)
        if not moments:
            return found, None
        if slope_factor is None:
            return found, -(far + decays * near)
        return found, factor * far + slope_factor * near

    return _find_terms([
        part(before.local), part(before.carry, 1), part(after, 1),
        part(again, factor=-torch.expm1(w), slope_factor=-w.exp())], k, u, v, top)


def bi_forward(w, u, k, v, blocks, eps) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.bi_wkv`; ``blocks`` is 0 for the paper's formula."""
    if not v.numel():
        return v.new_empty(v.shape)
    dtype = v.dtype
    terms = _find_both(*_prepare(w, u, k, v), blocks)
    return (terms.numerator / (terms.denominator + eps)).to(dtype).contiguous()


def bi_backward(grad, w, u, k, v, blocks, eps):
    """Gradients by w, u, k and v."""
    like = w, u, k, v
    if not v.numel():
        return tuple(map(torch.zeros_like, like))
    w, u, k, v = _prepare(w, u, k, v)
    terms = _find_both(w, u, k, v, blocks, moments=True)
    terms = terms._replace(denominator=terms.denominator + eps)
    drive = _drive(grad.to(v.dtype), terms)
    grad_w = (drive * terms.slope).sum((0, 1, 2))
    # In both modes with the weights of the paper: the official kernel has them here too.
    parts = [scan(w, -terms.top, drive).all for scan in (_scan, _scan_back)]
    return _like((grad_w, *_token_gradients(drive, terms, parts, u, k, v)), like)
