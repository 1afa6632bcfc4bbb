"""``causal_conv`` for any device: a product and a sum of the whole map for each tap."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan.activations import silu_backward


def _shifts(length: int, taps: int, reverse: bool):
    """(tap, steps back in time, where it is written, where it reads), but for the last tap."""
    for back in range(1, min(taps, length)):
        late, early = slice(back, None), slice(None, length - back)
        yield taps - 1 - back, *((early, late) if reverse else (late, early))


def _reach_back(length: int, taps: int, reverse: bool):
    """(tap, where it is written, what it reads of a state) for positions near the start."""
    for back in range(1, taps):
        count, first = min(back, length), taps - 1 - back
        written = slice(length - count, None) if reverse else slice(None, count)
        yield taps - 1 - back, written, slice(first, first + count)


def _in_memory(state: Tensor, reverse: bool) -> Tensor:
    """States in the order of positions, for they are in the order of time."""
    return state.flip(1) if reverse else state


def _by_tap(weight: Tensor) -> tuple[Tensor, ...]:
    """The weights (D) of each tap, next to one another: with gaps products take three times as long
    on a CPU."""
    return weight.T.contiguous().unbind(0)


def laid_out_like(x: Tensor, t: Tensor) -> Tensor:
    """(B, L, D) without gaps: with adjacent positions where only those of ``x`` are adjacent, as of
    a channel-first tensor, else with adjacent channels. So lies the gradient by x."""
    if x.stride(2) != 1 and x.stride(1) == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.contiguous()


def convolve(x, weight, bias, initial_state, reverse) -> Tensor:
    """The convolution alone, in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    x, tap_weights = x.to(dtype), _by_tap(weight.to(dtype))
    length, taps = x.shape[1], len(tap_weights)
    y = x * tap_weights[-1]
    if bias is not None:
        y += bias.to(dtype)
    for tap, written, read in _shifts(length, taps, reverse):
        y[:, written].addcmul_(x[:, read], tap_weights[tap])
    if initial_state is not None:
        state = initial_state.to(dtype)
        for tap, written, read in _reach_back(length, taps, reverse):
            y[:, written].addcmul_(_in_memory(state[:, read], reverse), tap_weights[tap])
    return y


def forward(x, weight, bias, initial_state, silu, reverse, return_final_state
            ) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.causal_conv`."""
    y = convolve(x, weight, bias, initial_state, reverse)
    if silu:
        F.silu(y, inplace=True)
    out = torch.empty_like(x).copy_(y)
    if not return_final_state:
        return out, x.new_empty(0)
    batch, length, dim = x.shape
    before = weight.shape[1] - 1
    state = x.new_zeros(batch, before, dim)
    new = min(before, length)
    if new:
        state[:, before - new:] = _in_memory(x[:, :new] if reverse else x[:, length - new:],
                                             reverse)
    if new < before and initial_state is not None:
        state[:, :before - new] = initial_state[:, new:]
    return out, state


def add_gradients(grad, x, weight, reverse, grad_x: Tensor, grad_weight: Tensor) -> None:
    """Add to the gradients by x and weight, from that by the convolution's result; without what
    concerns a first state. All are in the compute dtype."""
    tap_weights = _by_tap(weight)
    grad_x.addcmul_(grad, tap_weights[-1])
    grad_weight[:, -1] += _inner(grad, x)
    for tap, written, read in _shifts(x.shape[1], weight.shape[1], reverse):
        grad_x[:, read].addcmul_(grad[:, written], tap_weights[tap])
        grad_weight[:, tap] += _inner(grad[:, written], x[:, read])


def backward(grad_y, grad_state, x, weight, bias, initial_state, silu, reverse, return_final_state):
    """Gradients by x, weight, bias and initial_state (None where the input is None)."""
    dtype = compute_dtype(x.dtype)
    length, taps = x.shape[1], weight.shape[1]
    before, new = taps - 1, min(taps - 1, length)
    x_, weight_ = x.to(dtype), weight.to(dtype)
    grad_x = torch.zeros_like(x_)
    grad_weight = torch.zeros_like(weight_, memory_format=torch.contiguous_format)
    grad_bias, grad_initial = None, None
    if initial_state is not None:
        grad_initial = torch.zeros(initial_state.shape, dtype=dtype, device=x.device)
    if bias is not None:
        grad_bias = torch.zeros(bias.shape, dtype=dtype, device=x.device)
    if grad_y is not None:
        g = grad_y.to(dtype)
        if silu:
            g = silu_backward(g, convolve(x, weight, bias, initial_state, reverse))
        add_gradients(g, x_, weight_, reverse, grad_x, grad_weight)
        if grad_initial is not None:
            state = initial_state.to(dtype)
            for tap, written, read in _reach_back(length, taps, reverse):
                part = _in_memory(g[:, written], reverse)
                grad_initial[:, read].addcmul_(part, weight_[:, tap])
                grad_weight[:, tap] += _inner(part, state[:, read])
        if bias is not None:
            grad_bias = g.sum((0, 1))
    if return_final_state and grad_state is not None:
        grad_state = grad_state.to(dtype)
        if new:
            last = grad_x[:, :new] if reverse else grad_x[:, length - new:]
            last += _in_memory(grad_state[:, before - new:], reverse)
        if grad_initial is not None and new < before:
            grad_initial[:, new:] += grad_state[:, :before - new]
    grad_x = laid_out_like(x, grad_x.to(x.dtype))
    inputs, grads = (weight, bias, initial_state), (grad_weight, grad_bias, grad_initial)
    return grad_x, *(None if t is None else grad.to(t.dtype).contiguous()
                     for grad, t in zip(grads, inputs, strict=True))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over all but the last dimension."""
    return (a * b).sum((0, 1))
