"""State space duality and retention in plain PyTorch: products of matrices inside of chunks, and a
recurrence over the chunks. Arguments and results as of the ops' references.

B batch, L length in G chunks of Q tokens, H heads, P channels of a head, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.plain.recurrence import scan_carries, softplus

_CHUNK = 64


def ssd(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
        return_final_state, reverse) -> tuple[Tensor, Tensor | None]:
    if seq_idx is not None:
        raise NotImplementedError('ssd of several sequences in one has no form for other runtimes')
    dtype, heads = compute_dtype(x.dtype), x.shape[2]
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    dt = dt.clamp(dt_min, dt_max)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    if B.shape[2] != heads:  # head h is of group h // (H / G)
        B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    y, state = _scan(dt.unsqueeze(-1) * x, dt * A.to(dtype), B, C, initial_state, reverse)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state if return_final_state else None


def retention(q, k, v, log_decay, initial_state, return_final_state
              ) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(v.dtype)
    y, state = _scan(v.to(dtype), log_decay.to(dtype).expand(q.shape[:3]), k.to(dtype),
                     q.to(dtype), initial_state, False)
    return y.to(v.dtype), state if return_final_state else None


def _scan(x, a, B, C, initial, reverse) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, P, N) of ``S_t = exp(a_t) S_(t-1) + x_t B_t^T`` and
    ``y_t = S_t C_t``.

    Args:
        x: (B, L, H, P); a: (B, L, H); B, C: (B, L, H, N).
        initial: (B, H, P, N), or None.
    """
    if reverse:
        x, a, B, C = (t.flip(1) for t in (x, a, B, C))
    length = x.shape[1]
    missing = -length % _CHUNK
    # A token of zeros changes nothing, as the logarithm of its decay is zero.
    x_BGHQP, B_BGHQN, C_BGHQN = (
        F.pad(t, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, _CHUNK)).transpose(2, 3)
        for t in (x, B, C))
    a_BGHQ = F.pad(a, (0, 0, 0, missing)).unflatten(1, (-1, _CHUNK)).transpose(2, 3)
    sums = a_BGHQ.cumsum(-1)
    last = sums[..., -1:]
    order = torch.arange(_CHUNK, device=x.device)
    later = order[:, None] < order
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = (decays * (C_BGHQN @ B_BGHQN.mT)) @ x_BGHQP
    states = (x_BGHQP * (last - sums).exp().unsqueeze(-1)).mT @ B_BGHQN  # (B, G, H, P, N)
    over_chunk = last.exp().unsqueeze(-1)
    if initial is not None:
        first = states[:, :1] + over_chunk[:, :1] * initial.to(x.dtype).unsqueeze(1)
        entering = torch.cat((first, states[:, 1:]), dim=1)
        carries = scan_carries(over_chunk, entering, 1, False)
        carries = torch.cat((initial.to(x.dtype).unsqueeze(1), carries[:, 1:]), dim=1)
    else:
        carries = scan_carries(over_chunk, states, 1, False)
    final = over_chunk[:, -1] * carries[:, -1] + states[:, -1]
    y = y + sums.exp().unsqueeze(-1) * (C_BGHQN @ carries.mT)
    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    return y.flip(1) if reverse else y, final
