"""State space duality, in the three modes of Mamba-2's paper: the specification of the op.

B batch, L length, H heads, P channels of a head, N state. With the scalar decay exp(dt_t A) of a
head (arXiv 2405.21060, sections 3.1 and 5),

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

times silu(z_t) with a gate. ``recurrent`` is this loop, linear in L; ``quadratic`` is the dual
form, attention with a mask of decays in place of a softmax; ``chunked`` is quadratic inside of
chunks and linear over them. They give the same numbers. All are for reading and for tests, not for
speed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def forward(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
            return_final_state, reverse, mode='recurrent', **options
            ) -> tuple[Tensor, Tensor | None]:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.ssd`.

    Args:
        mode: 'recurrent', 'quadratic' or 'chunked', which takes ``chunk_len``.
    """
    dtype, (batch, _, heads, dim) = compute_dtype(x.dtype), x.shape
    dt = finish_dt(dt.to(dtype), dt_bias, dt_softplus, dt_min, dt_max)
    # Head h uses group h // (H / G).
    B_h, C_h = (t.to(dtype).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    inputs = x.to(dtype), dt, dt * A.to(dtype), B_h, C_h
    if reverse:
        inputs = [t.flip(1) for t in inputs]
    segments = number_segments(torch.zeros_like(dt[:, :, 0], dtype=torch.int32) if seq_idx is None
                               else seq_idx, reverse)
    if initial_state is None:
        initial_state = inputs[0].new_zeros(batch, heads, dim, B.shape[3])
    y, state = MODES[mode](*inputs, segments.flip(1) if reverse else segments,
                           initial_state.to(dtype), **options)
    if reverse:
        y = y.flip(1)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state if return_final_state else None


def finish_dt(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float
              ) -> Tensor:
    """dt as it is used: bias, softplus (the identity above 20) and limits, in this order."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(dt_min, dt_max)


def number_segments(seq_idx: Tensor, reverse: bool = False) -> Tensor:
    """The number of restarts up to each token: tokens of one number see one another.

    The state restarts from zero wherever ``seq_idx`` changes in the order of time. What comes
    before the first token, the initial state, has index 0.
    """
    if reverse:
        return number_segments(seq_idx.flip(1)).flip(1)
    return (seq_idx.diff(dim=1, prepend=seq_idx.new_zeros(len(seq_idx), 1)) != 0).cumsum(1)


# --- the three modes ----------------------------------------------------------------------------
# x (B, L, H, P); dt and the logarithm of decays a (B, L, H); B and C (B, L, H, N); segments (B, L);
# state (B, H, P, N). They return y (B, L, H, P) and the state after the last token.

def recurrent(x, dt, a, B, C, segments, state) -> tuple[Tensor, Tensor]:
    """Linear: token by token."""
    ys = []
    for t in range(x.shape[1]):
        restarts = segments[:, t] != (segments[:, t - 1] if t else 0)
        state = torch.where(restarts[:, None, None, None], 0, state)
        state = a[:, t].exp()[..., None, None] * state
        state = state + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, dim=1), state


def quadratic(x, dt, a, B, C, segments, state) -> tuple[Tensor, Tensor]:
    """Dual: y = (mask * C B^T) (dt x) with queries C, keys B, values x, and a mask of decays.

    The mask is 1-semiseparable (section 3.2.2): ``mask[t, s] = exp(a_(s+1) + ... + a_t)`` for
    s <= t, else 0. Here s = -1 is the initial state, column 0 of the mask.
    """
    decays = decay_mask(a, segments)
    scores = decays[..., 1:] * torch.einsum('bthn,bshn->bhts', C, B)
    y = torch.einsum('bhts,bsh,bshp->bthp', scores, dt, x)
    y = y + torch.einsum('bht,bthn,bhpn->bthp', decays[..., 0], C, state)
    last = decays[:, :, -1]  # of all tokens at the last one
    state = last[..., 0, None, None] * state
    return y, state + torch.einsum('bhs,bsh,bshp,bshn->bhpn', last[..., 1:], dt, x, B)


def chunked(x, dt, a, B, C, segments, state, chunk_len=64) -> tuple[Tensor, Tensor]:
    """Quadratic in chunks, linear over them (section 6): each starts with the state before it."""
    ys, length = [], x.shape[1]
    for first, end in pairwise([*range(0, length, chunk_len), length]):
        chunk = slice(first, end)
        # Restarts are counted from what comes before the chunk.
        within = segments[:, chunk] - (segments[:, first - 1, None] if first else 0)
        y, state = quadratic(*(t[:, chunk] for t in (x, dt, a, B, C)), within, state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


MODES = dict(recurrent=recurrent, quadratic=quadratic, chunked=chunked)


def decay_mask(a: Tensor, segments: Tensor) -> Tensor:
    """(B, L, H) -> (B, H, L, 1 + L), what is left at token t of token s and of the state before.

    The sums of ``a`` are those of masked values, never differences of large sums, and the mask
    comes before exp, so that strong decays give zeros and no NaN.
    """
    length = a.shape[1]
    time = torch.arange(length, device=a.device)
    # a_k is between s and t for s < k <= t; the first column is the state before, s = -1.
    later = time[:, None] > torch.cat([time.new_tensor([-1]), time])
    terms = torch.where(later, a.transpose(1, 2)[..., None], 0)
    sums = terms.cumsum(-2)
    origins = torch.cat([torch.zeros_like(segments[:, :1]), segments], dim=1)
    seen = F.pad(time[:, None] >= time, (1, 0), value=True)
    seen = seen & (segments[:, :, None] == origins[:, None])
    return torch.where(seen[:, None], sums, -torch.inf).exp()
