"""The op ``retention``: its definition, checks, and the public function."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, compute_dtype
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.retention import chunked, reference


def _fake(q, k, v, log_decay, initial_state, return_final_state, backend):
    batch, _, heads, dim = v.shape
    state = (batch, heads, dim, q.shape[3]) if return_final_state else 0
    return v.new_empty(v.shape), v.new_empty(state, dtype=compute_dtype(v.dtype))


_retention = define_op(
    'retention_fwd',
    '(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial_state, '
    'bool return_final_state, str backend) -> (Tensor y, Tensor final_state)',
    reference=reference.forward,
    fake=_fake,
    results=2,
    implementations={'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='q k v log_decay initial_state return_final_state',
    # As of ssd: a multiply-add each for decay, drive and read of every number of the state.
    flops=lambda q, v, **_: 6 * v[0] * v[1] * v[2] * v[3] * q[3])


def retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *,
              initial_state: Tensor | None = None, return_final_state: bool = False,
              backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Retention of RetNet (arXiv 2307.08621, section 2.1), linear in the length.

    Head h runs ``S_t = gamma_h S_(t-1) + v_t k_t^T`` and returns ``y_t = S_t q_t``, which is the
    sum over i <= t of ``gamma_h^(t - i) <q_t, k_i> v_i``: nothing is scaled or normalised. Every
    tensor has a gradient, which also flows through the states.

    Args:
        q, k: (B, L, H, N), fp16, bf16, fp32 or fp64.
        v: (B, L, H, P).
        log_decay: (H), the logarithms of gamma.
        initial_state: (B, H, P, N), the state before the first token, or None for zeros.
        return_final_state: return the state after the last token too.
        backend: 'reference', the recurrent form, or 'chunked', the chunkwise one; None for that.

    Returns:
        (B, L, H, P) in the dtype of ``v``, whatever autocast says; with ``return_final_state`` a
        tuple of it and the final state (B, H, P, N), fp32 (fp64 for fp64 input).

    Raises:
        ValueError: on shapes that do not fit one another, or an unknown backend.

    Example:
        >>> q, k, v = torch.randn(2, 50, 4, 16), torch.randn(2, 50, 4, 16), torch.randn(2, 50, 4, 8)
        >>> retention(q, k, v, log_decay=-torch.rand(4)).shape
        torch.Size([2, 50, 4, 8])
    """
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError('retention expects q and k (B, L, H, N) and v (B, L, H, P); got '
                         f'{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}')
    if min(q.shape[3], v.shape[3]) < 1 or q.shape[1] < 1:
        raise ValueError('retention expects L, N and P of at least 1; got '
                         f'q {tuple(q.shape)} and v {tuple(v.shape)}')
    if not q.dtype == k.dtype == v.dtype or q.is_complex():
        raise ValueError('retention expects q, k and v of one real dtype; got '
                         f'{q.dtype}, {k.dtype} and {v.dtype}')
    check_state('retention', q, v, log_decay, initial_state)
    y, state = _retention(q, k, v, log_decay, initial_state, return_final_state, backend=backend)
    return (y, state) if return_final_state else y


def log_decays(num_heads: int, like: Tensor) -> Tensor:
    """The decays of RetNet (section 2.2): (H), the logarithms of 1 - 2^(-5 - h), in fp32 at least,
    on the device of ``like``."""
    heads = torch.arange(num_heads, device=like.device, dtype=compute_dtype(like.dtype))
    return torch.log1p(-2 ** (-5 - heads))


def check_state(name: str, q: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    """Raise ValueError unless decay and state fit (B, ..., H, N) and (B, ..., H, P)."""
    heads = v.shape[-2]
    shape = v.shape[0], heads, v.shape[-1], q.shape[-1]
    if log_decay.shape != (heads,):
        raise ValueError(f'{name} expects log_decay of shape {(heads,)}, got '
                         f'{tuple(log_decay.shape)}')
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f'{name} expects a state of shape {shape}, got {tuple(state.shape)}')
