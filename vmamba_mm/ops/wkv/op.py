"""The ops ``wkv`` and ``bi_wkv``: their definitions, checks, and the public functions."""

from typing import Literal

from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, compute_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.wkv import chunked, cuda, reference

#: What ``mode`` of ``bi_wkv`` may be.
MODES = 'paper', 'official'


def wkv_flops(batch: int, length: int, channels: int, directions: int = 1) -> int:
    """FLOPs of the recurrence: 3 multiply-adds for each of the two sums (decay, drive, read).

    What an implementation calculates depends on its blocks; this does not. torch counts a
    multiply-add as 2.
    """
    return 12 * batch * length * channels * directions


def _fake(w, u, k, v, state, return_state, backend):
    batch, _, channels = v.shape
    final = (batch, 3, channels) if return_state else 0
    return v.new_empty(v.shape), v.new_empty(final, dtype=compute_dtype(v.dtype))


_wkv = define_op(
    'wkv_fwd',
    '(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool return_state, str backend) '
    '-> (Tensor y, Tensor final_state)',
    reference=reference.forward,
    fake=_fake,
    results=2,
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='w u k v state return_state',
    flops=lambda v, **_: wkv_flops(*v))

_bi_wkv = define_op(
    'bi_wkv_fwd',
    '(Tensor w, Tensor u, Tensor k, Tensor v, int blocks, float eps, str backend) -> Tensor',
    reference=reference.bi_forward,
    fake=lambda w, u, k, v, *_: v.new_empty(v.shape),
    implementations={
        'cuda': Implementation(cuda.bi_forward, cuda.bi_backward, cuda.bi_why_not),
        'chunked': Implementation(chunked.bi_forward, chunked.bi_backward)},
    saves='w u k v blocks eps',
    flops=lambda v, **_: wkv_flops(*v, directions=2))


def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None = None,
        return_state: bool = False, backend: Backend | None = None
        ) -> Tensor | tuple[Tensor, Tensor]:
    """The causal WKV of RWKV-4 (arXiv 2305.13048, equation 16): a mean of values whose weights fall
    with the distance, for each channel.

    With ``d = exp(w)``, output t is the mean of the values of all tokens i up to t, the earlier
    ones with the weight ``exp(k_i - (t - 1 - i) d)`` and its own with ``exp(u + k_t)``. Every
    tensor has a gradient, which also flows through the states.

    Args:
        w: (C), the logarithm of the decay from token to token (``time_decay``).
        u: (C), the bonus of the current token (``time_first``).
        k, v: (B, T, C), of one dtype, fp16, bf16, fp32 or fp64. Keys may be of any size: exponents
            are held relative to the largest of them.
        state: (B, 3, C), what was before the first token, as ``wkv`` or :func:`wkv_step` has
            returned it: the sums of values and of weights over ``exp(p)``, and p. None for
            nothing.
        return_state: return the state after the last token too. Its p is a constant for gradients;
            what depends on p e.g. by ``state[:, 0] / state[:, 1]`` or by another call of the op has
            the right ones.
        backend: 'reference', 'chunked' or 'cuda'; None for 'cuda' where an NVIDIA GPU takes the
            inputs, else 'chunked'.

    Returns:
        (B, T, C) in the dtype of ``v``, whatever autocast says; with ``return_state`` a tuple of it
        and the state, fp32 (fp64 for fp64 input). Sums are fp32 (fp64) whatever the dtypes.

    Raises:
        ValueError: on shapes or dtypes that do not fit one another, or an unknown backend.

    Example, of one channel and no decay to speak of: the mean of all tokens so far:
        >>> w, zero = torch.tensor([-50.]), torch.zeros(1)
        >>> wkv(w, zero, torch.zeros(1, 3, 1), torch.tensor([[[1.], [2.], [6.]]])).flatten()
        tensor([1.0000, 1.5000, 3.0000])
    """
    _check('wkv', w, u, k, v)
    batch, _, channels = v.shape
    check_shapes('wkv', {'v': v}, state=(state, (batch, 3, channels)))
    y, final = _wkv(w, u, k, v, state, return_state, backend=backend)
    return (y, final) if return_state else y


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *,
           mode: Literal['paper', 'official'] = 'paper', blocks: int = 32, eps: float = 1e-6,
           backend: Backend | None = None) -> Tensor:
    """The WKV of both directions of Vision-RWKV (arXiv 2403.02308, equation 4): a mean of the
    values of all tokens, for each channel.

    In output t the weight of token i is ``exp(k_i - (|t - i| - 1) w)``, and that of token t itself
    ``exp(u + k_t)``. Every tensor has a gradient.

    Args:
        w: (C), the decay from token to token, of any sign. The models pass ``spatial_decay / T``.
        u: (C), the bonus of the token itself (``spatial_first / T``).
        k, v: (B, T, C), of one dtype, fp16, bf16, fp32 or fp64; any T, and keys of any size.
        mode: 'paper' for the formula above with its gradients; 'official' for what the released
            kernel calculates in its place, which published weights were trained with: the README of
            this op's folder has its formula. Its gradients by k and v are those of the kernel, not
            those of the result.
        blocks, eps: of the official mode alone: the number of blocks that the kernel cuts the
            tokens into, and what it adds to denominators.
        backend: 'reference', 'chunked' or 'cuda'; None for 'cuda' where an NVIDIA GPU takes the
            inputs, else 'chunked'.

    Returns:
        (B, T, C) in the dtype of ``v``, whatever autocast says. Sums are fp32 (fp64 for fp64
        input).

    Raises:
        ValueError: on shapes or dtypes that do not fit one another, or an unknown mode or backend.

    Example, of one channel without decay: the mean of all tokens:
        >>> zero = torch.zeros(1)
        >>> bi_wkv(zero, zero, torch.zeros(1, 3, 1), torch.tensor([[[1.], [2.], [6.]]])).flatten()
        tensor([3., 3., 3.])
    """
    _check('bi_wkv', w, u, k, v)
    check_mode(mode)
    if not isinstance(blocks, int) or blocks < 1 or eps < 0:
        raise ValueError('bi_wkv expects blocks of at least 1 and an eps of at least 0, got '
                         f'{blocks!r} and {eps!r}')
    official = mode == 'official'
    return _bi_wkv(w, u, k, v, blocks if official else 0, float(eps) if official else 0.0,
                   backend=backend)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f'mode={mode!r} does not exist; choose one of {MODES}')


def _check(name: str, w, u, k, v) -> None:
    if v.dim() != 3 or v.shape[1] < 1 or v.shape[2] < 1:
        raise ValueError(f'{name} expects v (B, T, C) with T and C of at least 1, got '
                         f'{tuple(v.shape)}')
    channels = v.shape[2]
    check_shapes(name, {'v': v}, w=(w, (channels,)), u=(u, (channels,)), k=(k, v.shape))
    if k.dtype != v.dtype or not v.dtype.is_floating_point:
        raise ValueError(f'{name} expects k and v of one real dtype; got {k.dtype}, {v.dtype}')
