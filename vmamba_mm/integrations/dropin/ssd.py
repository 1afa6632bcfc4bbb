"""``mamba_ssm.ops.triton.ssd_combined``: the scan of Mamba-2, on :func:`vmamba_mm.ops.ssd`."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.integrations.dropin.conv import convolve_sequences
from vmamba_mm.integrations.dropin.norms_gated import rmsnorm_fn
from vmamba_mm.ops import ssd

NO_LIMIT = 0.0, math.inf


def mamba_chunk_scan_combined(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                              chunk_size: int, D: Tensor | None = None, z: Tensor | None = None,
                              dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
                              seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
                              dt_softplus: bool = False,
                              dt_limit: tuple[float, float] = NO_LIMIT,
                              return_final_states: bool = False,
                              return_varlen_states: bool = False,
                              state_dtype: torch.dtype | None = None):
    """The scan of Mamba-2.

    Args:
        x: (B, L, H, P). dt: (B, L, H). A: (H). B, C: (B, L, G, N).
        chunk_size: has no effect on the result.
        D: (H), or (H, P), or None. z: as ``x``, the gate, or None. dt_bias: (H), or None.
        initial_states: (B, H, P, N), of sequence 0, or None for zeros.
        seq_idx: (B, L), the number of each token's sequence where a row holds several.
        cu_seqlens: (sequences + 1), where they begin and end, for ``return_varlen_states``.
        dt_softplus: softplus of dt, after the bias.
        dt_limit: the least and the greatest dt after it.
        return_final_states: also return the state after the last token of each row, (B, H, P, N).
        return_varlen_states: also return that of each sequence, of a single row, without a
            gradient: (sequences, H, P, N).
        state_dtype: has no effect: states are fp32, or fp64 for fp64 input.

    Returns:
        As ``x``; a tuple where states are asked for, which come in the order above.

    Raises:
        ValueError: if ``return_varlen_states`` has no ``cu_seqlens``, or several rows.
    """
    shared = dict(dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_state=True)
    y, final_states = ssd(x, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_states,
                          seq_idx=seq_idx, **shared)
    states = [final_states] if return_final_states else []
    if return_varlen_states:
        if cu_seqlens is None or len(x) != 1:
            raise ValueError('return_varlen_states takes cu_seqlens and a batch of one row, got '
                             f'{"no cu_seqlens" if cu_seqlens is None else f"{len(x)} rows"}')
        ends, of_sequences = cu_seqlens.tolist(), []
        with torch.no_grad():
            for number, (start, end) in enumerate(pairwise(ends)):
                part = (t[:, start:end] for t in (x, dt, B, C))
                x_part, dt_part, B_part, C_part = part
                of_sequences.append(ssd(
                    x_part, dt_part, A, B_part, C_part, dt_bias=dt_bias,
                    initial_state=None if number else initial_states, **shared)[1])
        states.append(torch.cat(of_sequences))
    return (y, *states) if states else y


class Parts(NamedTuple):
    """What ``in_proj`` of Mamba-2 gives, each (B, L, ...)."""

    mlp: Tensor | None  #: the gated channels beside the scan
    z: Tensor
    xBC: Tensor  #: before the convolution
    dt: Tensor


def split_projection(zxbcdt: Tensor, d_ssm: int, channels: int, heads: int) -> Parts:
    """Take apart (B, L, ...), with so many channels of the scan, of the convolution, and heads."""
    d_mlp = (zxbcdt.shape[-1] - d_ssm - channels - heads) // 2
    gate, value, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, d_ssm, channels, heads], dim=-1)
    return Parts(F.silu(gate) * value if d_mlp else None, z, xBC, dt)


def in_heads(x: Tensor, count: int) -> Tensor:
    """(..., count * P) to (..., count, P)."""
    return x.unflatten(-1, (count, -1))


def scan(xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, d_ssm: int, groups: int,
         z: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """The scan of what comes from the convolution (B, L, ...): (B, L, d_ssm), and the final state.

    Args:
        D: (H), or (H, P). z: (B, L, d_ssm), the gate, or None.
        options: of :func:`vmamba_mm.ops.ssd`.
    """
    heads, of_group = len(A), (xBC.shape[-1] - d_ssm) // 2
    x, B, C = xBC.split([d_ssm, of_group, of_group], dim=-1)
    y, state = ssd(in_heads(x, heads), dt, A, in_heads(B, groups), in_heads(C, groups), D,
                   z=None if z is None else in_heads(z, heads), dt_bias=dt_bias, dt_softplus=True,
                   return_final_state=True, **options)
    return y.flatten(-2), state


def mamba_split_conv1d_scan_combined(
        zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor,
        A: Tensor, D: Tensor, chunk_size: int, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None, dt_limit: tuple[float, float] = NO_LIMIT,
        return_final_states: bool = False, activation: str | None = 'silu',
        rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
        headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True):
    """The block of Mamba-2 behind ``in_proj``.

    Args:
        zxbcdt: (B, L, 2M + 2HP + 2GN + H), of which 2M channels are a gated MLP, 0 in most models.
        conv1d_weight: (HP + 2GN, W). conv1d_bias: (HP + 2GN), or None.
        dt_bias: (H), added to dt before softplus. A: (H). D: (H), or (H, P).
        chunk_size: has no effect on the result.
        initial_states, seq_idx, dt_limit, return_final_states: as of
            :func:`mamba_chunk_scan_combined`; the convolution keeps sequences apart too.
        activation: of the convolution, 'silu', 'swish' (the same) or None.
        rmsnorm_weight: (HP), of an RMSNorm with the gate z, of each group by itself; None for the
            gate alone. rmsnorm_eps, norm_before_gate: of the norm.
        outproj_weight, outproj_bias: of a linear map of the result, or None.
        headdim: P, where ``D`` does not say it. ngroups: G.

    Returns:
        (B, L, M + HP), or the result of the linear map; with the final states a tuple of both.

    Raises:
        ValueError: if ``headdim`` is needed and absent.
    """
    if D.dim() == 1 and headdim is None:
        raise ValueError('mamba_split_conv1d_scan_combined takes headdim where D is of heads alone')
    heads = len(D)
    dim = D.numel() if D.dim() == 2 else heads * headdim
    parts = split_projection(zxbcdt, dim, len(conv1d_weight), heads)
    xBC = convolve_sequences(parts.xBC, conv1d_weight, conv1d_bias, seq_idx, activation)
    y, states = scan(xBC, parts.dt, A, D, dt_bias, dim, ngroups,
                     None if rmsnorm_weight is not None else parts.z, dt_limit=dt_limit,
                     initial_state=initial_states, seq_idx=seq_idx)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, parts.z, rmsnorm_eps, dim // ngroups,
                       norm_before_gate)
    if parts.mlp is not None:
        y = torch.cat([parts.mlp, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y
