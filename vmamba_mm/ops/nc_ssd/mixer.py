"""The op ``nc_ssd_mixer``: all that lies between the two projections of VSSD's mixer, so that the
gradient by the first one's result is written as one map."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.dwconv import dwconv_silu
from vmamba_mm.ops.fused.dwconv.reference import dwconv_silu as dwconv_silu_reference
from vmamba_mm.ops.nc_ssd import cuda, reference
from vmamba_mm.ops.nc_ssd.op import nc_ssd_norm


def _split(projected: Tensor, inner: int, heads: int, states: int) -> tuple[Tensor, ...]:
    """z, what the convolution takes, and dt, of (B, H, W, E); what is left over is not read."""
    z, xBC, dt, _ = projected.split(
        (inner, inner + states, heads, projected.shape[-1] - 2 * inner - states - heads), dim=-1)
    return z, xBC, dt


def _of_heads(xBC: Tensor, inner: int, heads: int, groups: int) -> tuple[Tensor, ...]:
    """x (B, L, heads, P), B and C (B, L, groups, N) of the convolution's result (B, H, W, ...)."""
    states = (xBC.shape[-1] - inner) // 2
    x, B, C = xBC.flatten(1, 2).split((inner, states, states), dim=-1)
    return x.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (groups, -1)) for t in (B, C))


def _steps(convolve, finish):
    """The op by two functions, for the signature that it has."""
    def run(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias, groups,
            positive, eps):
        inner, heads = len(norm_weight), len(A)
        z, xBC, dt = _split(projected, inner, heads, len(conv_weight) - inner)
        x, B, C = _of_heads(convolve(xBC, conv_weight, conv_bias), inner, heads, groups)
        return finish(x, dt.flatten(1, 2), A, B, C, D, dt_bias, z.flatten(1, 2), norm_weight,
                      norm_bias, positive, eps).view(z.shape)

    return run


_reference = _steps(
    dwconv_silu_reference, lambda *args: reference.forward_norm(*args[:-2], True, *args[-2:]))
_step_by_step = _steps(
    dwconv_silu, lambda x, dt, A, B, C, D, dt_bias, z, weight, bias, positive, eps: nc_ssd_norm(
        x, dt, A, B, C, D, z=z, norm_weight=weight, norm_bias=bias, eps=eps, dt_bias=dt_bias,
        dt_softplus=True, positive=positive))


def _why_not(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias, groups,
             positive, eps) -> str | None:
    if not projected.is_contiguous() or projected.shape[-1] * projected.itemsize % 16:
        return 'the rows of the projection do not begin at multiples of 16 bytes'
    inner, heads = len(norm_weight), len(A)
    z, xBC, dt = _split(projected, inner, heads, len(conv_weight) - inner)
    if (reason := dwconv.why_not(xBC, conv_weight, conv_bias)) is not None:
        return reason
    x, B, C = _of_heads(xBC, inner, heads, groups)
    return cuda.why_not_norm(x, dt.flatten(1, 2), A, B, C, D, dt_bias, z.flatten(1, 2),
                             norm_weight, norm_bias, True, positive, eps)


def _forward(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias, groups,
             positive, eps, save):
    """(result, the convolution's, states, moments), empty for the last three unless ``save``."""
    inner, heads = len(norm_weight), len(A)
    z, xBC, dt = _split(projected, inner, heads, len(conv_weight) - inner)
    convolved = dwconv.forward(xBC, conv_weight, conv_bias)
    x, B, C = _of_heads(convolved, inner, heads, groups)
    y, states, moments = cuda.forward_norm(
        x, dt.flatten(1, 2), A, B, C, D, dt_bias, z.flatten(1, 2), norm_weight, norm_bias, True,
        positive, eps, save)
    return y.view(z.shape), convolved if save else x.new_empty(0), states, moments


def _backward(grad, projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias,
              convolved, states, moments, groups, positive, eps):
    """Gradients by the eight tensors; that by the projection is written part by part."""
    inner, heads = len(norm_weight), len(A)
    sizes = inner, heads, len(conv_weight) - inner
    dprojected, dconvolved = torch.empty_like(projected), torch.empty_like(convolved)
    (z, xBC, dt), (dz, dxBC, ddt) = (_split(t, *sizes) for t in (projected, dprojected))
    dprojected[..., sum(sizes) + inner:].zero_()
    (x, B, C), (dx, dB, dC) = (_of_heads(t, inner, heads, groups)
                               for t in (convolved, dconvolved))
    _, _, dA, _, _, dD, dbias, _, dnorm_weight, dnorm_bias = cuda.backward_norm(
        grad.flatten(1, 2), x, dt.flatten(1, 2), A, B, C, D, dt_bias, z.flatten(1, 2), norm_weight,
        norm_bias, states, moments, True, positive, eps, (dx, ddt.flatten(1, 2), dB, dC),
        dz.flatten(1, 2))
    _, dconv_weight, dconv_bias = dwconv.backward(dconvolved, xBC, conv_weight, conv_bias, dxBC)
    return (dprojected, dconv_weight, None if conv_bias is None else dconv_bias, dA, dD, dbias,
            dnorm_weight, dnorm_bias)


def _fake(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias, groups,
          positive, eps, save):
    batch, height, width, _ = projected.shape
    inner, pixels = norm_weight.shape[0], batch * height * width
    states = batch * (conv_weight.shape[0] - inner) // (2 * groups) * inner
    return (projected.new_empty((batch, height, width, inner)),
            projected.new_empty((batch, height, width, conv_weight.shape[0]) if save else 0),
            projected.new_empty(states if save else 0),
            projected.new_empty((pixels if save else 0, 2), dtype=torch.float32))


def _count_flops(projected, conv_weight, norm_weight, groups, **_) -> int:
    pixels = projected[0] * projected[1] * projected[2]
    states = (conv_weight[0] - norm_weight[0]) // (2 * groups)
    return pixels * (2 * 9 * conv_weight[0] + 4 * norm_weight[0] * states)


_nc_ssd_mixer = define_op(
    'nc_ssd_mixer',
    '(Tensor projected, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor D, Tensor dt_bias, '
    'Tensor norm_weight, Tensor norm_bias, int groups, bool positive, float eps, bool save) -> '
    '(Tensor y, Tensor convolved, Tensor states, Tensor moments)',
    reference=_reference,
    fake=_fake,
    implementations={'cuda': Implementation(_forward, _backward, _why_not, saves=True)},
    saves='projected conv_weight conv_bias A D dt_bias norm_weight norm_bias convolved states '
          'moments groups positive eps',
    flops=_count_flops)


def nc_ssd_mixer(projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A: Tensor,
                 D: Tensor, dt_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, *,
                 groups: int = 1, positive: bool = True, eps: float = 1e-5) -> Tensor:
    """What lies between the two projections of VSSD's mixer (figure 3, arXiv 2407.18559).

    ``projected`` has z (H P channels), x (as many), B and C (G N each) and dt (H) side by side, and
    after them what is not read. :func:`vmamba_mm.ops.dwconv_silu` of x, B and C, then
    :func:`nc_ssd_norm`. On an NVIDIA GPU, if rows begin at multiples of 16 bytes, the gradient by
    ``projected`` is written as one map, and not put together from its parts.

    Args:
        projected: (B, height, width, E).
        conv_weight, conv_bias: (H P + 2 G N, 1, 3, 3), (H P + 2 G N); the bias may be None.
        A, D, dt_bias: (H).
        norm_weight, norm_bias: (H P).
        groups: G.
        positive: as of :func:`nc_ssd`.
        eps: of the norm.

    Returns:
        (B, height, width, H P) without gaps, in the dtype of ``projected``.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example, of two heads of 4 channels and 8 states:
        >>> projected, ones = torch.randn(1, 5, 7, 8 + 24 + 2), torch.ones(8)
        >>> weight, A = torch.randn(24, 1, 3, 3), -torch.ones(2)
        >>> nc_ssd_mixer(projected, weight, None, A, A, A, ones, ones).shape
        torch.Size([1, 5, 7, 8])
    """
    inner, heads, channels = norm_weight.numel(), A.numel(), conv_weight.shape[0]
    if groups < 1 or heads < 1 or heads % groups or channels <= inner:
        raise ValueError(f'nc_ssd_mixer expects groups of at least 1 that divide the {heads} heads '
                         f'and a convolution of more than the {inner} channels of the norm, got '
                         f'groups={groups} and conv_weight {tuple(conv_weight.shape)}')
    if projected.dim() != 4 or inner % heads or (channels - inner) % (2 * groups) \
            or projected.shape[3] < inner + channels + heads:
        raise ValueError(
            'nc_ssd_mixer expects projected (B, height, width, E), E of at least '
            f'{inner + channels + heads} for {inner} channels of {heads} heads and a convolution '
            f'of {channels}; got {tuple(projected.shape)}')
    of_heads = (heads,)
    if not (A.shape == D.shape == dt_bias.shape == of_heads
            and norm_weight.shape == norm_bias.shape == (inner,)
            and conv_weight.shape == (channels, 1, 3, 3)
            and (conv_bias is None or conv_bias.shape == (channels,))):
        check_shapes('nc_ssd_mixer', {'projected': projected, 'conv_weight': conv_weight},
                     conv_weight=(conv_weight, (channels, 1, 3, 3)),
                     conv_bias=(conv_bias, (channels,)), A=(A, of_heads), D=(D, of_heads),
                     dt_bias=(dt_bias, of_heads), norm_weight=(norm_weight, (inner,)),
                     norm_bias=(norm_bias, (inner,)))
    args = (projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, norm_bias, groups,
            positive, eps)
    if torch.compiler.is_compiling() and torch.compiler.is_exporting():
        return _step_by_step(*args)
    return _nc_ssd_mixer(*args, otherwise=_step_by_step)
