"""The op ``linear_attention``: its definition, checks, and the public function."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.linear_attention import chunked, reference, triton_backend


def _count_flops(q, v, augmented, **_) -> int:
    """Those of the state, the numerators, the denominators, and the scores of the tokens."""
    batch, length, heads, dim = q
    return 2 * batch * length * heads * dim * (2 * v[3] + 1 + augmented)


_linear_attention = define_op(
    'linear_attention_fwd',
    '(Tensor q, Tensor k, Tensor v, Tensor? turns, bool augmented, float eps, str backend) '
    '-> Tensor',
    reference=reference.forward,
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
    implementations={
        'triton': Implementation(triton_backend.forward, triton_backend.backward,
                                 triton_backend.why_not),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='q k v turns augmented eps',
    no_grad='turns',
    flops=_count_flops)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, turns: Tensor | None = None,
                     augmented: bool = False, eps: float = 1e-6,
                     backend: Backend | None = None) -> Tensor:
    """Attention with elu + 1 in place of the softmax (arXiv 2006.16236, section 3.2.1), linear in
    the number of tokens, as in MILA (arXiv 2405.16605) and RAVLT (arXiv 2411.07635).

    For each head, with ``f = elu(q) + 1`` and ``g = elu(k) + 1``::

        y_i = R_i f_i . S / (f_i . z + eps),  S = sum_j a_j (R_j g_j) v_j^T,  z = sum_j a_j g_j

    The rotation R of a token is in the numerator alone, which so may be negative. The weight of a
    token, a_j, is 1 / L, or of rank augmented linear attention (arXiv 2411.07635, section 3.2), by
    which the state has a higher rank, ``softmax_j(mean_i(f_i) . g_j / sqrt(P))``. The weights sum
    to 1, so no sum grows with the map. Where authors' code multiplies by L and takes means, L
    cancels, and is left out here.

    Args:
        q, k: (B, L, n, P), queries and keys of n heads as projected, without elu and rotation.
        v: (B, L, n, E).
        turns: (L, n P / 2, 2), in fp32 (fp64 for fp64), cosines and sines by which pairs of
            neighbouring channels of a token turn, all heads side by side; None for no rotation. It
            has no gradient. :func:`vmamba_mm.ops.rotation.map_rotation_table` makes them.
        augmented: whether the weights of the tokens are those of rank augmentation.
        eps: added to the denominators.
        backend: 'reference', a loop over tokens, 'chunked' for matrix products, or 'triton' for
            kernels on a GPU with up to 128 channels a head; None for the last of these that takes
            the inputs, under ``torch.compile`` and ``torch.export`` for ops of torch.

    Returns:
        (B, L, n, E) without gaps, in the dtype of ``v``, whatever autocast says. Features, weights
        and denominators are in fp32 (fp64 for fp64); products are in the dtype of ``v`` with sums
        in fp32.

    Raises:
        ValueError: on shapes or dtypes that do not fit one another, or an unknown backend.

    Example, of two tokens with the same key, whose values are so averaged:
        >>> q, v = torch.zeros(1, 2, 1, 1), torch.tensor([[[[1.]], [[2.]]]])
        >>> linear_attention(q, q, v, eps=0.).flatten()
        tensor([1.5000, 1.5000])
    """
    if q.dim() != 4 or v.dim() != 4 or q.shape[1] < 1:
        raise ValueError('linear_attention expects q (B, L, n, P) and v (B, L, n, E), L of at '
                         f'least 1, got {tuple(q.shape)} and {tuple(v.shape)}')
    channels = q.shape[2] * q.shape[3]
    check_shapes('linear_attention', {'q': q}, k=(k, q.shape), v=(v, (*q.shape[:3], v.shape[3])),
                 turns=(turns, (q.shape[1], channels // 2, 2)))
    if turns is not None and channels % 2:
        raise ValueError('linear_attention turns pairs of channels, an even number in all heads, '
                         f'got q {tuple(q.shape)}')
    if not q.dtype == k.dtype == v.dtype or not v.dtype.is_floating_point:
        raise ValueError('linear_attention expects q, k and v of one real dtype; got '
                         f'{q.dtype}, {k.dtype}, {v.dtype}')
    args = q, k, v, turns, augmented, eps
    if backend is None and torch.compiler.is_compiling():
        return chunked.compose(*args)
    return _linear_attention(*args, backend=backend)
