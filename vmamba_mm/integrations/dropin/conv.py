"""``causal_conv1d_fn`` and ``_update`` of causal_conv1d, on :func:`vmamba_mm.ops.causal_conv`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.layers.mamba2 import own_windows
from vmamba_mm.ops import causal_conv
from vmamba_mm.ops.core.backends import compute_dtype


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None,
                     seq_idx: Tensor | str | None = None, initial_states: Tensor | None = None,
                     return_final_states: bool = False, final_states_out: Tensor | None = None,
                     activation: str | None = None):
    """Depthwise causal convolution.

    Args:
        x: (B, D, L), in any memory layout.
        weight: (D, W). bias: (D), or None.
        seq_idx: (B, L), the number of each position's sequence, where a sample holds several: none
            reads another. It excludes states. A string is the activation, which was the fourth
            argument in causal_conv1d 1.0.
        initial_states: the W-1 positions before x, (B, D, W-1), or None for zeros.
        return_final_states: also return the last W-1 positions, (B, D, W-1).
        final_states_out: a tensor for them to be written to.
        activation: 'silu', 'swish' (the same) or None.

    Returns:
        (B, D, L) in the dtype of ``x``, or this and the final states.

    Raises:
        ValueError: on ``seq_idx`` with states.
        NotImplementedError: on another activation.
    """
    return _convolve(x, weight, bias, seq_idx, initial_states, return_final_states,
                     final_states_out, activation, None)


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None,
                      initial_states: Tensor | str | None = None,
                      return_final_states: bool = False, final_states_out: Tensor | None = None,
                      activation: str | None = None):
    """:func:`causal_conv1d_fn`, by the reference of the op."""
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    return _convolve(x, weight, bias, None, initial_states, return_final_states, final_states_out,
                     activation, 'reference')


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor,
                         bias: Tensor | None = None, activation: str | None = None,
                         cache_seqlens: Tensor | None = None,
                         conv_state_indices: Tensor | None = None) -> Tensor:
    """The next positions of a causal convolution.

    Args:
        x: (B, D) or (B, D, S).
        conv_state: the positions before, (B, D, W-1 or more), newest last; changed in place.
        weight: (D, W). bias: (D), or None.
        activation: 'silu', 'swish' (the same) or None.
        cache_seqlens: (B), how many positions came before; ``conv_state`` is then a ring that is
            written from ``cache_seqlens`` modulo its length.
        conv_state_indices: (B), the rows of a larger ``conv_state`` to use; -1 for a sample that is
            padding, whose result is 0.

    Returns:
        As ``x``.
    """
    silu = uses_silu(activation)
    if conv_state_indices is not None:
        is_used = conv_state_indices >= 0
        rows = conv_state[conv_state_indices.clamp(min=0)]
        y = causal_conv1d_update(x, rows, weight, bias, activation, cache_seqlens)
        conv_state[conv_state_indices[is_used]] = rows[is_used]
        return y.where(is_used.view(-1, *[1] * (x.dim() - 1)), 0)
    new = x[..., None] if x.dim() == 2 else x
    before, size = weight.shape[1] - 1, conv_state.shape[-1]
    if size < before:
        raise ValueError(f'causal_conv1d_update expects a conv_state of {before} positions or more '
                         f'for a weight of {before + 1}, got {size}')
    if cache_seqlens is None:
        state = conv_state[..., size - before:].clone()
        conv_state.copy_(torch.cat([conv_state, new], -1)[..., -size:])
    else:
        state = conv_state.gather(-1, _ring(cache_seqlens, -before, 0, conv_state))
        conv_state.scatter_(-1, _ring(cache_seqlens, 0, new.shape[-1], conv_state),
                            new.to(conv_state.dtype))
    y = causal_conv(new.transpose(1, 2), weight, bias, silu=silu,
                    initial_state=state.to(new.dtype).transpose(1, 2)).transpose(1, 2)
    return y[..., 0] if x.dim() == 2 else y


#: The op's reference has the same results; both names are imported.
causal_conv1d_update_ref = causal_conv1d_update


def _ring(position: Tensor, start: int, end: int, ring: Tensor) -> Tensor:
    """Indices into ``ring`` (B, D, S) of the positions from ``start`` to ``end`` of each sample."""
    steps = torch.arange(start, end, device=position.device)
    index = (position.long()[:, None] + steps) % ring.shape[-1]
    return index[:, None].expand(-1, ring.shape[1], -1)


def _convolve(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out,
              activation, backend):
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError('causal_conv1d takes seq_idx without initial_states and '
                             'return_final_states')
        return convolve_sequences(x.transpose(1, 2), weight, bias, seq_idx,
                                  activation).transpose(1, 2)
    if initial_states is not None:
        initial_states = initial_states.transpose(1, 2)
    result = causal_conv(x.transpose(1, 2), weight, bias, silu=uses_silu(activation),
                         initial_state=initial_states, return_final_state=return_final_states,
                         backend=backend)
    if not return_final_states:
        return result.transpose(1, 2)
    y, final = (t.transpose(1, 2) for t in result)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def convolve_sequences(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None,
                       activation: str | None) -> Tensor:
    """:func:`causal_conv1d_fn` of (B, L, D)."""
    silu = uses_silu(activation)
    if seq_idx is None:
        return causal_conv(x, weight, bias, silu=silu)
    dtype = compute_dtype(x.dtype)
    windows = own_windows(x, seq_idx, weight.shape[1]).to(dtype)
    y = (windows * weight.to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype).view_as(x)


def refuse_seq_idx(seq_idx: Tensor | None) -> None:
    """Raise NotImplementedError if there is one."""
    if seq_idx is not None:
        raise NotImplementedError('causal_conv1d_cuda of vmamba_mm.dropin has no seq_idx, '
                                  'causal_conv1d_fn of causal_conv1d has')


def uses_silu(activation: str | None) -> bool:
    """Whether the activation is SiLU.

    Raises:
        NotImplementedError: on another than 'silu', 'swish' and None, as causal_conv1d does.
    """
    if activation not in (None, 'silu', 'swish'):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None
