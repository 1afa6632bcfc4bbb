"""The ops ``nc_ssd`` and ``nc_ssd_norm``: their definitions, checks, and the public functions."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, runs_kernels
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.add_norm import layer_norm
from vmamba_mm.ops.nc_ssd import chunked, cuda, reference


def _count_flops(x, B, **_) -> int:
    batch, length, heads, dim = x
    return 4 * batch * length * heads * dim * B[3]


def _norm_fake(x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps,
               save):
    batch, length, heads, dim = x.shape
    states = batch * B.shape[2] * B.shape[3] * heads // B.shape[2] * dim
    return (x.new_empty(z.shape), x.new_empty(states if save else 0),
            x.new_empty((batch * length if save else 0, 2), dtype=torch.float32))


_nc_ssd = define_op(
    'nc_ssd_fwd',
    '(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, '
    'bool dt_softplus, bool positive, str backend) -> Tensor',
    reference=reference.forward,
    fake=lambda x, *_: x.new_empty(x.shape),
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='x dt A B C D dt_bias dt_softplus positive',
    flops=_count_flops)


def nc_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
           dt_bias: Tensor | None = None, dt_softplus: bool = False, positive: bool = True,
           backend: Backend | None = None) -> Tensor:
    """Non-causal state space duality of VSSD (arXiv 2407.18559, section 3.2).

    The decay of Mamba-2 is no recurrence here but the weight of a token in a state that all tokens
    share, so their order has no meaning: ``w_l = -dt_l A``, ``S = sum_l w_l B_l x_l^T`` and
    ``y_l = C_l S + D x_l``, for each head. Every tensor has a gradient.

    Args:
        x: (B, L, H, P), of any strides.
        dt: (B, L, H); with ``dt_bias`` (H) added first, and with ``dt_softplus`` softplus of that.
        A: (H), below zero, as of Mamba-2.
        B, C: (B, L, G, N). Head h is of group h mod G, unlike in Mamba-2.
        D: (H), or None.
        positive: whether the weight is ``-dt A``, as of every published model; else ``dt A``.
        backend: 'reference', 'chunked' for matrix products, or 'cuda'; None for 'cuda' where an
            NVIDIA GPU takes the inputs (sm_80 or newer, P and N multiples of 8, N up to 128), else
            'chunked'. Under ``torch.compile`` without those kernels, and under ``torch.export``,
            None takes the products of 'chunked' as ops of torch.

    Returns:
        (B, L, H, P) without gaps, in the dtype of ``x``, whatever autocast says. Weights are in
        fp32 (fp64 for fp64); products are in the dtype of ``x`` with sums in fp32.

    Raises:
        ValueError: on shapes or dtypes that do not fit one another, or an unknown backend.

    Example, of two tokens and one head:
        >>> x, ones = torch.tensor([[[[1.]], [[2.]]]]), torch.ones(1, 2, 1, 1)
        >>> nc_ssd(x, torch.ones(1, 2, 1), torch.tensor([-0.5]), ones, ones).flatten()
        tensor([1.5000, 1.5000])
    """
    _check(x, dt, A, B, C, D, dt_bias)
    args = x, dt, A, B, C, D, dt_bias, dt_softplus, positive
    if backend is None and torch.compiler.is_compiling() and (
            torch.compiler.is_exporting() or not runs_kernels(x) or cuda.why_not(*args)):
        return chunked.compose(*args)
    return _nc_ssd(*args, backend=backend)


_nc_ssd_norm = define_op(
    'nc_ssd_norm_fwd',
    '(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor z, '
    'Tensor norm_weight, Tensor norm_bias, bool dt_softplus, bool positive, float eps, bool save) '
    '-> (Tensor y, Tensor states, Tensor moments)',
    reference=reference.forward_norm,
    fake=_norm_fake,
    implementations={'cuda': Implementation(cuda.forward_norm, cuda.backward_norm,
                                            cuda.why_not_norm, saves=True)},
    saves='x dt A B C D dt_bias z norm_weight norm_bias states moments dt_softplus positive eps',
    flops=_count_flops)


def _step_by_step(x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps
                  ) -> Tensor:
    """By :func:`nc_ssd` and :func:`vmamba_mm.ops.layer_norm`."""
    y = nc_ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, positive=positive)
    y = layer_norm(y.flatten(2), norm_weight, norm_bias, eps, out_dtype=x.dtype)
    return (y * z).to(x.dtype)


def nc_ssd_norm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
                z: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5,
                dt_bias: Tensor | None = None, dt_softplus: bool = False, positive: bool = True
                ) -> Tensor:
    """``z`` times the LayerNorm over all channels of :func:`nc_ssd`, as in the mixer of VSSD.

    On an NVIDIA GPU, where B and C are of one group, nothing lies in memory between; for its
    backward it keeps the inputs, the state and two numbers for each token. Elsewhere the steps one
    after the other.

    Args:
        x, dt, A, B, C, D, dt_bias, dt_softplus, positive: as of :func:`nc_ssd`.
        z: (B, L, H P).
        norm_weight, norm_bias: (H P).
        eps: added to the variance.

    Returns:
        (B, L, H P) without gaps, in the dtype of ``x``, whatever autocast says.

    Raises:
        ValueError: on shapes or dtypes that do not fit one another.

    Example:
        >>> x, ones = torch.randn(1, 5, 2, 8), torch.ones(16)
        >>> B, dt, A = torch.randn(1, 5, 1, 16), torch.rand(1, 5, 2), -torch.ones(2)
        >>> nc_ssd_norm(x, dt, A, B, B, z=x.flatten(2), norm_weight=ones, norm_bias=ones).shape
        torch.Size([1, 5, 16])
    """
    _check(x, dt, A, B, C, D, dt_bias)
    channels = x.shape[2] * x.shape[3]
    if z.shape != (*x.shape[:2], channels) or norm_weight.shape != (channels,) \
            or norm_bias.shape != (channels,):
        raise ValueError(f'nc_ssd_norm expects z (B, L, {channels}), norm_weight and norm_bias '
                         f'({channels}) beside x {tuple(x.shape)}; got {tuple(z.shape)}, '
                         f'{tuple(norm_weight.shape)} and {tuple(norm_bias.shape)}')
    args = (x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps)
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return _step_by_step(*args)
    return _nc_ssd_norm(*args, otherwise=_step_by_step)


def _check(x, dt, A, B, C, D, dt_bias) -> None:
    if x.dim() != 4 or B.dim() != 4 or x.shape[1] < 1 or x.shape[2] % max(1, B.shape[2]):
        raise ValueError('nc_ssd expects x (B, L, H, P), L of at least 1, and B (B, L, G, N), G '
                         f'a divisor of H; got x {tuple(x.shape)}, B {tuple(B.shape)}')
    batch, length, heads, _ = x.shape
    shared = batch, length, *B.shape[2:]
    check_shapes('nc_ssd', {'x': x}, dt=(dt, (batch, length, heads)), A=(A, (heads,)),
                 B=(B, shared), C=(C, shared), D=(D, (heads,)), dt_bias=(dt_bias, (heads,)))
    if not x.dtype == B.dtype == C.dtype or not x.dtype.is_floating_point:
        raise ValueError('nc_ssd expects x, B and C of one real dtype; got '
                         f'{x.dtype}, {B.dtype}, {C.dtype}')
