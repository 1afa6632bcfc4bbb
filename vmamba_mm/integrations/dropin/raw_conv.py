"""The extension ``causal_conv1d_cuda``, which forks call past its Python interface.

Its arguments are positional and have grown with its versions; their number tells which is meant.
Nothing here has a gradient of its own: the callers are backward passes.
"""

import torch
from torch import Tensor

from vmamba_mm.integrations.dropin.conv import causal_conv1d_update as update
from vmamba_mm.integrations.dropin.conv import refuse_seq_idx
from vmamba_mm.ops import causal_conv


@torch.no_grad()
def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor | None:
    """The forward; ``x`` (B, D, L), ``weight`` (D, W), ``bias`` (D) or None. What follows is

    - in 1.0: silu
    - in 1.1: seq_idx, silu
    - in 1.2 to 1.4: seq_idx, initial_states, final_states_out, silu; they return the result
    - from 1.5 on: seq_idx, initial_states, out, final_states_out, silu; they write it to ``out``
    """
    seq_idx = initial = out = final = None
    match rest:
        case [silu]:
            pass
        case [seq_idx, silu]:
            pass
        case [seq_idx, initial, final, silu]:
            pass
        case [seq_idx, initial, out, final, silu]:
            pass
        case _:
            raise _unknown('causal_conv1d_fwd', 3 + len(rest), '4, 5, 7 or 8')
    y, state = _forward(x, weight, bias, seq_idx, initial, silu)
    if final is not None:
        final.copy_(state)
    if out is None:
        return y
    out.copy_(y)
    return None


def causal_conv1d_bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest):
    """The backward, with the gradients by x, weight and bias. What follows ``dout`` is

    - in 1.0: dx, silu
    - in 1.1: seq_idx, dx, silu
    - in 1.2 to 1.4: seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu; they
      return the gradient by the initial states too
    - from 1.5 on: seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states,
      silu; they write the gradients there
    """
    seq_idx = initial = dfinal = None
    match rest:
        case [dx, silu]:
            pass
        case [seq_idx, dx, silu]:
            pass
        case [seq_idx, initial, dfinal, dx, wants_dinitial, silu]:
            pass
        case [seq_idx, initial, dfinal, *into, silu] if len(into) == 4:
            grads = _backward(x, weight, bias, dout, seq_idx, initial, dfinal, silu)
            for target, grad in zip(into, grads, strict=True):
                if target is not None and grad is not None:
                    target.copy_(grad)
            return None
        case _:
            raise _unknown('causal_conv1d_bwd', 4 + len(rest), '6, 7, 10 or 12')
    x_grad, *grads, dinitial = _backward(x, weight, bias, dout, seq_idx, initial, dfinal, silu)
    x_grad = x_grad if dx is None else dx.copy_(x_grad)
    if len(rest) < 6:
        return x_grad, *grads
    return x_grad, *grads, dinitial if wants_dinitial else None


@torch.no_grad()
def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None,
                         *rest) -> Tensor | None:
    """The next position; ``conv_state`` is changed in place. What follows ``bias`` is

    - up to 1.3: silu
    - in 1.4: silu, cache_seqlens and, in some, conv_state_indices
    - from 1.5 on: out, silu, cache_seqlens, conv_state_indices; they write the result to ``out``
    """
    out = seqlens = indices = None
    match rest:
        case [silu]:
            pass
        case [silu, seqlens]:
            pass
        case [silu, seqlens, indices]:
            pass
        case [out, silu, seqlens, indices]:
            pass
        case _:
            raise _unknown('causal_conv1d_update', 4 + len(rest), '5, 6, 7 or 8')
    y = update(x, conv_state, weight, bias, 'silu' if silu else None, seqlens, indices)
    if out is None:
        return y
    out.copy_(y)
    return None


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out,
                               silu_activation) -> Tensor:
    """:func:`causal_conv1d_fwd` as ``causal_conv1d.cpp_functions`` names it."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out,
                             silu_activation)


def causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                               return_dinitial_states, silu_activation):
    """:func:`causal_conv1d_bwd` as ``causal_conv1d.cpp_functions`` names it."""
    return causal_conv1d_bwd(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                             return_dinitial_states, silu_activation)


def causal_conv1d_update_function(x, conv_state, weight, bias, silu_activation, cache_seqlens=None,
                                  conv_state_indices=None) -> Tensor:
    """:func:`causal_conv1d_update` as ``causal_conv1d.cpp_functions`` names it."""
    return causal_conv1d_update(x, conv_state, weight, bias, silu_activation, cache_seqlens,
                                conv_state_indices)


def _unknown(name: str, count: int, known: str) -> TypeError:
    return TypeError(f'{name} of vmamba_mm.dropin takes {known} arguments, as the versions 1.0 to '
                     f'1.6 of causal_conv1d do; got {count}')


def _forward(x, weight, bias, seq_idx, initial, silu) -> tuple[Tensor, Tensor]:
    refuse_seq_idx(seq_idx)
    if initial is not None:
        initial = initial.transpose(1, 2)
    y, state = causal_conv(x.transpose(1, 2), weight, bias, silu=silu, initial_state=initial,
                           return_final_state=True)
    return y.transpose(1, 2), state.transpose(1, 2)


def _backward(x, weight, bias, dout, seq_idx, initial, dfinal, silu) -> list[Tensor | None]:
    """The gradients by x, weight, bias and the initial states, None for what is absent."""
    tensors = [None if t is None else t.detach().requires_grad_()
               for t in (x, weight, bias, initial)]
    with torch.enable_grad():
        y, state = _forward(*tensors[:3], seq_idx, tensors[3], silu)
        results, grads = ([y], [dout]) if dfinal is None else ([y, state], [dout, dfinal])
        found = iter(torch.autograd.grad(results, [t for t in tensors if t is not None],
                                         [g.to(r.dtype) for r, g in zip(results, grads,
                                                                        strict=True)]))
    return [None if t is None else next(found) for t in tensors]
