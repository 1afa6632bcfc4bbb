"""Retention in the three forms of RetNet's paper: the specification of the op.

With a decay gamma for each head (arXiv 2307.08621, section 2.1),

    S_t = gamma S_(t-1) + v_t k_t^T        y_t = S_t q_t = sum_(i <= t) gamma^(t - i) <q_t, k_i> v_i

``recurrent`` is this loop, ``parallel`` the sum, and ``chunkwise`` the sum inside of chunks and the
loop over them. They give the same numbers. All are for reading and for tests, not for speed.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def forward(q, k, v, log_decay, initial_state, return_final_state, mode='recurrent', **options
            ) -> tuple[Tensor, Tensor | None]:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.retention`.

    Args:
        mode: 'recurrent', 'parallel' or 'chunkwise', which takes ``chunk_len``.
    """
    dtype, (batch, _, heads, dim) = compute_dtype(v.dtype), q.shape
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, v.shape[3], dim, dtype=dtype)
    inputs = (t.to(dtype) for t in (q, k, v, log_decay, initial_state))
    y, state = MODES[mode](*inputs, **options)
    return y.to(v.dtype), state if return_final_state else None


# q and k (B, L, H, N), v (B, L, H, P), log_decay (H), state (B, H, P, N). They return y
# (B, L, H, P) and the state after the last token.

def recurrent(q, k, v, log_decay, state) -> tuple[Tensor, Tensor]:
    """Linear: token by token."""
    gamma, ys = log_decay.exp()[:, None, None], []
    for t in range(q.shape[1]):
        state = gamma * state + v[:, t, :, :, None] * k[:, t, :, None]
        ys.append((state * q[:, t, :, None]).sum(-1))
    return torch.stack(ys, dim=1), state


def parallel(q, k, v, log_decay, state) -> tuple[Tensor, Tensor]:
    """Attention without a softmax, whose scores decay with the distance."""
    steps = torch.arange(q.shape[1], device=q.device)
    distance = steps[:, None] - steps
    decay = (log_decay[:, None, None] * distance).exp().masked_fill(distance < 0, 0)  # (H, L, L)
    scores = torch.einsum('blhn, bmhn -> bhlm', q, k) * decay
    y = torch.einsum('bhlm, bmhp -> blhp', scores, v)
    since = (log_decay * (steps[:, None] + 1)).exp()  # (L, H), of the state before
    y = y + torch.einsum('bhpn, blhn, lh -> blhp', state, q, since)
    left = torch.einsum('blhp, blhn, lh -> bhpn', v, k, (log_decay * (len(steps) - 1
                                                                     - steps[:, None])).exp())
    return y, since[-1][:, None, None] * state + left


def chunkwise(q, k, v, log_decay, state, chunk_len=4) -> tuple[Tensor, Tensor]:
    """Linear over chunks, parallel inside of them."""
    ys = []
    for parts in zip(*(t.split(chunk_len, dim=1) for t in (q, k, v)), strict=True):
        y, state = parallel(*parts, log_decay, state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


MODES = {'recurrent': recurrent, 'parallel': parallel, 'chunkwise': chunkwise}
