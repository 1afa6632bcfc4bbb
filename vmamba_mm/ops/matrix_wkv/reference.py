"""The states of RWKV-5, 6 and 7, token by token: the specification of the ops.

B batch, T tokens, H heads, N channels of a key, P of a value. A state S of a head is a matrix (N,
P), of channels of keys and of values, and d_t = exp(-exp(w_t)) its decay, for each channel of keys.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def forward_wkv6(r, k, v, w, u, initial_state, return_final_state) -> tuple[Tensor, Tensor | None]:
    """RWKV-6 (arXiv 2404.05892, section 4). Shapes as in :func:`vmamba_mm.ops.wkv6`."""
    r_t, k_t, v_t, w_t, u, state = _prepare(r, k, v, w, u, initial_state)
    ys = []
    for tokens in zip(r_t, k_t, v_t, w_t, strict=True):
        y, state = step_wkv6(state, *tokens, u)
        ys.append(y)
    return torch.stack(ys, dim=1).to(r.dtype), state if return_final_state else None


def forward_wkv7(r, w, k, v, a, b, initial_state, return_final_state
                 ) -> tuple[Tensor, Tensor | None]:
    """RWKV-7 (arXiv 2503.14456, section 3). Shapes as in :func:`vmamba_mm.ops.wkv7`."""
    r_t, w_t, v_t, k_t, a_t, b_t, state = _prepare(r, w, v, k, a, b, initial_state)
    ys = []
    for tokens in zip(r_t, w_t, k_t, v_t, a_t, b_t, strict=True):
        y, state = step_wkv7(state, *tokens)
        ys.append(y)
    return torch.stack(ys, dim=1).to(r.dtype), state if return_final_state else None


def step_wkv6(state, r, k, v, w, u) -> tuple[Tensor, Tensor]:
    """y = r (S + diag(u) k v^T), then S = diag(d) S + k v^T.

    Args:
        state: (B, H, N, P); r, k, w: (B, H, N); v: (B, H, P); u: (H, N); all of one dtype.

    Returns:
        y (B, H, P) and the new state.
    """
    new = k[..., None] * v[..., None, :]
    y = (r[..., None] * (state + u[..., None] * new)).sum(-2)
    return y, (-w.exp()).exp()[..., None] * state + new


def step_wkv7(state, r, w, k, v, a, b) -> tuple[Tensor, Tensor]:
    """S = diag(d) S + b (a S) + k v^T, with the state before on the right, then y = r S.

    Shapes as in :func:`step_wkv6`, and those of a and b are that of k.
    """
    removed = (a[..., None] * state).sum(-2)
    state = (-w.exp()).exp()[..., None] * state + b[..., None] * removed[..., None, :] \
        + k[..., None] * v[..., None, :]
    return (r[..., None] * state).sum(-2), state


def _prepare(r, k, v, *others):
    """The tokens of each tensor in the dtype of the computation; parameters; the first state."""
    *others, initial = others
    dtype = compute_dtype(r.dtype)
    tensors = [t.to(dtype) for t in (r, k, v, *others)]
    if initial is None:
        initial = r.new_zeros(len(r), *r.shape[2:], v.shape[3])
    return (*(t.unbind(1) if t.dim() == 4 else t for t in tensors), initial.to(dtype))
