"""The op ``mamba_inner``: its definition, checks, and the public function."""

from functools import partial

from torch import Tensor

from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.mamba_inner import chunked, cuda, reference, triton_scan
from vmamba_mm.ops.scan_kernels import triton_backend
from vmamba_mm.ops.selective_scan.op import scan_flops


def _count_flops(xz, conv_weight, x_proj, dt_proj, A, **_) -> int:
    """FLOPs of convolutions, projections and scans, from shapes."""
    batch, length, _ = xz
    routes, dim, width = conv_weight
    products = 2 * batch * routes * length * dim * (width + x_proj[1] + dt_proj[2])
    return products + scan_flops(batch, routes * dim, length, A[2])


def _fake(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale, backend,
          save):
    batch, length, width = xz.shape
    shape, rows, total = (batch, length, width // 2), 0, 0
    if backend == 'cuda' and save:
        rows = len(A), batch * length, cuda.projected_pitch(x_proj.shape[1])
        total = shape
    return xz.new_empty(shape), xz.new_empty(0), xz.new_empty(rows), xz.new_empty(total)


_TRITON = Implementation(
    partial(chunked.forward, way=triton_scan), partial(chunked.backward, way=triton_scan),
    lambda xz, *rest: triton_backend.why_not(xz, xz.dtype, by_default=False))

_mamba_inner = define_op(
    'mamba_inner_fwd',
    '(Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, '
    'Tensor dt_bias, Tensor A, Tensor D, bool reverse, float scale, str backend, bool save) -> '
    '(Tensor y, Tensor convolved, Tensor projected, Tensor saved)',
    reference=reference.forward,
    fake=_fake,
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not, saves=True),
        'triton': _TRITON,
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='xz conv_weight conv_bias x_proj dt_proj dt_bias A D convolved projected saved reverse '
          'scale',
    flops=_count_flops)


def mamba_inner(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
                dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, *, reverse: bool = False,
                scale: float = 1.0, backend: Backend | None = None) -> Tensor:
    """The S6 mixer between its two outer projections as one op, for one direction or for both.

    Figure 3 of arXiv 2312.00752; both directions are algorithm 1 of arXiv 2401.09417. For each of
    K directions: causal convolution and SiLU of x, projection to (dt, B, C), softplus(dt W + bias),
    selective scan with skip, times silu(z). Every tensor has a gradient.

    Args:
        xz: (B, L, 2*D), x in the first D channels and the gate z in the others; fp16, bf16, fp32
            or fp64. The parameters carry the directions first: K = 1 is one, K = 2 runs forward
            and backward.
        conv_weight: (K, D, W), the last tap for the position itself.
        conv_bias: (K, D), or None.
        x_proj: (K, R + 2N, D), its rows in the order dt, B, C.
        dt_proj: (K, D, R).
        dt_bias: (K, D).
        A: (K, D, N), real, below zero for a state that decays (the model's ``-exp(A_log)``).
        D: (K, D), the skip.
        reverse: for K = 1, run backwards in time.
        scale: factor of the result: 0.5 for the mean of both directions.
        backend: 'reference', 'chunked', 'cuda' or 'triton'; None for the first of 'cuda' (an NVIDIA
            GPU) and 'triton' (a GPU) that takes the inputs, else 'chunked'.

    Returns:
        (B, L, D) without gaps in the dtype of ``xz``, the directions summed, whatever autocast
        says. It is calculated in fp32 (fp64 for fp64), but by 'cuda' the projections in the dtype
        of ``xz``, as under autocast.

    Raises:
        ValueError: on shapes that do not fit one another, a complex ``A``, ``reverse`` with K = 2,
            or an unknown backend.

    Example, for D = 8 channels, K = 2 directions, W = 4, R = 1 and N = 2:
        >>> xz, conv, x_proj = torch.randn(2, 9, 16), torch.randn(2, 8, 4), torch.randn(2, 5, 8)
        >>> mamba_inner(xz, conv, torch.zeros(2, 8), x_proj, torch.randn(2, 8, 1),
        ...             torch.zeros(2, 8), -torch.ones(2, 8, 2), torch.ones(2, 8)).shape
        torch.Size([2, 9, 8])
    """
    _check(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse)
    return _mamba_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse,
                        float(scale), backend=backend)


def _check(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse) -> None:
    if xz.dim() != 3 or conv_weight.dim() != 3 or dt_proj.dim() != 3 or A.dim() != 3:
        raise ValueError('mamba_inner expects xz (B, L, 2*D), conv_weight (K, D, W), dt_proj '
                         f'(K, D, R) and A (K, D, N); got xz {tuple(xz.shape)}, conv_weight '
                         f'{tuple(conv_weight.shape)}, dt_proj {tuple(dt_proj.shape)}, A '
                         f'{tuple(A.shape)}')
    routes, dim, taps = conv_weight.shape
    rank, state = dt_proj.shape[2], A.shape[2]
    if routes not in (1, 2):
        raise ValueError(f'mamba_inner expects K of 1 or 2 directions, got conv_weight '
                         f'{tuple(conv_weight.shape)}')
    if reverse and routes == 2:
        raise ValueError('mamba_inner runs forward and backward with K = 2 directions: reverse is '
                         'for K = 1')
    if xz.shape[2] != 2 * dim or xz.shape[1] < 1 or min(dim, taps, rank, state) < 1:
        raise ValueError(f'mamba_inner expects xz (B, L, {2 * dim}) with L >= 1 beside conv_weight '
                         f'{tuple(conv_weight.shape)}, and W, R and N of at least 1; got xz '
                         f'{tuple(xz.shape)}, dt_proj {tuple(dt_proj.shape)}, A {tuple(A.shape)}')
    if A.is_complex():
        raise ValueError(f'mamba_inner expects a real A, got {A.dtype}: complex is not supported')
    by_channel = (routes, dim)
    check_shapes('mamba_inner', {'xz': xz, 'conv_weight': conv_weight, 'dt_proj': dt_proj, 'A': A},
                 conv_bias=(conv_bias, by_channel),
                 x_proj=(x_proj, (routes, rank + 2 * state, dim)),
                 dt_proj=(dt_proj, (routes, dim, rank)), dt_bias=(dt_bias, by_channel),
                 A=(A, (routes, dim, state)), D=(D, by_channel))
