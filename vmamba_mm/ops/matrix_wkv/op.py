"""The ops ``wkv6`` and ``wkv7``, and ``wkv5`` as a case of the first: definitions and checks."""

from typing import Literal

from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.matrix_wkv import chunked, fla, reference
from vmamba_mm.ops.matrix_wkv.checks import check

Backend = Literal['reference', 'chunked', 'fla']


def _fake(r, v, return_final_state):
    state = (len(r), *r.shape[2:], v.shape[3]) if return_final_state else 0
    return r.new_empty(v.shape), r.new_empty(state, dtype=compute_dtype(r.dtype))


def _wkv_flops(products: int, r, v) -> int:
    """Multiply-adds of the recurrence for each number of the state; torch counts them as 2."""
    batch, length, heads, size = r
    return 2 * products * batch * length * heads * size * v[3]


_wkv6 = define_op(
    'wkv6_fwd',
    '(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state, '
    'bool return_final_state, str backend) -> (Tensor y, Tensor final_state)',
    reference=reference.forward_wkv6,
    fake=lambda r, k, v, w, u, initial_state, final, *_: _fake(r, v, final),
    results=2,
    implementations={'chunked': Implementation(chunked.forward_wkv6, chunked.backward_wkv6)},
    saves='r k v w u initial_state return_final_state',
    flops=lambda r, v, **_: _wkv_flops(3, r, v))

_wkv7 = define_op(
    'wkv7_fwd',
    '(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, '
    'bool return_final_state, str backend) -> (Tensor y, Tensor final_state)',
    reference=reference.forward_wkv7,
    fake=lambda r, w, k, v, a, b, initial_state, final, *_: _fake(r, v, final),
    results=2,
    implementations={'chunked': Implementation(chunked.forward_wkv7, chunked.backward_wkv7)},
    saves='r w k v a b initial_state return_final_state',
    flops=lambda r, v, **_: _wkv_flops(5, r, v))


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
         initial_state: Tensor | None = None, return_final_state: bool = False,
         backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The time mixing of RWKV-6, Finch (arXiv 2404.05892, section 4).

    A head returns ``y_t = r_t (S_(t-1) + diag(u) k_t v_t^T)`` and then has the state ``S_t =
    diag(exp(-exp(w_t))) S_(t-1) + k_t v_t^T``, a matrix of channels of keys and of values. Every
    tensor has a gradient, which also flows through the states.

    Args:
        r, k: (B, T, H, N), fp16, bf16, fp32 or fp64.
        v: (B, T, H, P).
        w: (B, T, H, N), of which exp(-exp(w)) is the decay of the state before, whatever it is.
        u: (H, N), the bonus of the token itself.
        initial_state: (B, H, N, P), the state before the first token, or None for zeros.
        return_final_state: return the state after the last token too.
        backend: 'reference', 'chunked' for chunks in plain PyTorch on any device, or 'fla' for the
            kernels of flash-linear-attention on a GPU. None takes 'fla' where it is installed, for
            fp16 and bf16 on a GPU in eager mode, and 'chunked' elsewhere.

    Returns:
        (B, T, H, P) in the dtype of ``r``, whatever autocast says; with ``return_final_state`` a
        tuple of it and the final state (B, H, N, P), fp32 (fp64 for fp64 input). Decays and states
        are fp32 (fp64) whatever the dtypes.

    Raises:
        ValueError: on shapes that do not fit one another, or an unknown backend.
        UserError: from 'fla', if what is installed does not calculate this.

    Example:
        >>> k = torch.randn(2, 50, 4, 8)
        >>> wkv6(k, k, k, k, torch.randn(4, 8)).shape
        torch.Size([2, 50, 4, 8])
    """
    check('wkv6', 'BTH', r, v, dict(k=k, w=w), u, initial_state=initial_state)
    return _run(fla.wkv6, _wkv6, (r, k, v, w, u, initial_state, return_final_state), backend)


def wkv5(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
         initial_state: Tensor | None = None, return_final_state: bool = False,
         backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The time mixing of RWKV-5, Eagle (arXiv 2404.05892, section 3): :func:`wkv6` with a decay
    that is the same for all tokens.

    Args:
        w: (H, N), of which exp(-exp(w)) is the decay.
        r, k, v, u, initial_state, return_final_state, backend: as of :func:`wkv6`, which it also
            returns and raises as.

    Example:
        >>> k = torch.randn(2, 50, 4, 8)
        >>> wkv5(k, k, k, torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([2, 50, 4, 8])
    """
    if r.dim() == 4 and tuple(w.shape) != tuple(r.shape[2:]):
        raise ValueError(f'wkv5 expects w of shape {tuple(r.shape[2:])} beside r {tuple(r.shape)}, '
                         f'got {tuple(w.shape)}')
    check('wkv5', 'BTH', r, v, dict(k=k), u, initial_state=initial_state)
    return wkv6(r, k, v, w.expand(r.shape), u, initial_state=initial_state,
                return_final_state=return_final_state, backend=backend)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *,
         initial_state: Tensor | None = None, return_final_state: bool = False,
         backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The time mixing of RWKV-7, Goose (arXiv 2503.14456, section 3): a generalised delta rule.

    A head has the state ``S_t = (diag(exp(-exp(w_t))) + b_t a_t^T) S_(t-1) + k_t v_t^T``, a matrix
    of channels of keys and of values, and returns ``y_t = r_t S_t``. Every tensor has a gradient,
    which also flows through the states.

    Args:
        r, k: (B, T, H, N), fp16, bf16, fp32 or fp64.
        w: (B, T, H, N), of which exp(-exp(w)) is the decay, whatever it is.
        v: (B, T, H, P).
        a, b: (B, T, H, N), of which the model makes a key of length 1 that is removed, ``-kappa``,
            and how much of it, ``kappa`` times a rate. Where ``b_t a_t^T`` is no such thing the
            state may grow without limit.
        initial_state, return_final_state, backend: as of :func:`wkv6`.

    Returns:
        As :func:`wkv6`.

    Raises:
        ValueError, UserError: as :func:`wkv6`.

    Example:
        >>> k = torch.nn.functional.normalize(torch.randn(2, 50, 4, 8), dim=-1)
        >>> wkv7(k, k, k, k, -k, k / 2).shape
        torch.Size([2, 50, 4, 8])
    """
    check('wkv7', 'BTH', r, v, dict(w=w, k=k, a=a, b=b), initial_state=initial_state)
    return _run(fla.wkv7, _wkv7, (r, w, k, v, a, b, initial_state, return_final_state), backend)


def _run(with_fla, op, args, backend):
    if backend == 'fla' or backend is None and fla.is_default(args[0]):
        y, state = with_fla(*args)
    else:
        y, state = op(*args, backend=backend)
    return (y, state) if args[-1] else y
