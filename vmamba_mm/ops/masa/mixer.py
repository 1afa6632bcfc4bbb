"""The op ``masa_mixer``: RMT's attention with its projections and the convolution beside it."""

import functools
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.core.launch import why_not_beside
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.mlp.cuda import column_sums
from vmamba_mm.ops.masa import cuda, lepe
from vmamba_mm.ops.masa.op import check_places, masa
from vmamba_mm.ops.scan_kernels.cuda import dense


def by_steps(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
             out_weight, out_bias, decay, turns, whole, masks: Sequence[Tensor] | None = None
             ) -> Tensor:
    """The op in PyTorch's own ops and :func:`masa`."""
    q, k, v = (F.linear(x, weight, bias) for weight, bias in (
        (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)))
    heads = (t.unflatten(-1, (len(decay), -1)) for t in (q, k, v))
    y = masa(*heads, decay, 'whole' if whole else 'decomposed', masks=masks, turns=turns).flatten(3)
    beside = F.conv2d(v.permute(0, 3, 1, 2), lepe_weight, lepe_bias, padding=2,
                      groups=len(lepe_weight))
    return F.linear(y + beside.permute(0, 2, 3, 1), out_weight, out_bias)


def _why_not(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
             out_weight, out_bias, decay, turns, whole) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels around the attention'
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    heads = x.unflatten(-1, (len(decay), -1))
    return cuda.why_not(heads, heads, heads, decay, turns, whole) or why_not_beside(
        x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
        out_weight, out_bias)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of four parameters the first three as one and the fourth, in ``dtype``."""
    rounded = cast(parts, dtype)
    first = rounded[0]
    if all(part.dtype == dtype for part in parts):
        return torch.cat(rounded[:3]), rounded[3]
    # They lie one after the other, as each has a multiple of 8 elements.
    return first.as_strided((3 * len(first), *first.shape[1:]), first.stride()), rounded[3]


def _split(qkv: Tensor, shape: Sequence[int], heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, W, n, P) of (BHW, 3C)."""
    return qkv.view(*shape[:3], 3, heads, -1).unbind(3)


def _forward(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
             out_weight, out_bias, decay, turns, whole, save):
    """The result; for the backward the projections, what comes of the rows, and what the last
    product takes; empty unless ``save``."""
    weight, last = _joined((q_weight, k_weight, v_weight, out_weight), x.dtype)
    bias, last_bias = _joined((q_bias, k_bias, v_bias, out_bias), x.dtype)
    qkv = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T)
    q, k, v = _split(qkv, x.shape, len(decay))
    y, rows = cuda.forward(q, k, v, decay, turns, whole, save)
    y = y.view(x.shape)
    lepe.add(v.flatten(3), lepe_weight, lepe_bias, y)
    result = torch.addmm(last_bias, y.view(-1, x.shape[-1]), last.T).view(x.shape)
    if save:
        return result, qkv, rows, y
    empty = x.new_empty(0)
    return result, empty, empty.clone(), empty.clone()


def _backward(grad, x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
              out_weight, out_bias, decay, turns, qkv, rows, y, whole):
    """Gradients by x and the parameters, in their dtypes."""
    dim = x.shape[-1]
    weight, last = _joined((q_weight, k_weight, v_weight, out_weight), x.dtype)
    grad, flat = dense(grad.reshape(-1, dim)), x.reshape(-1, dim)
    dout = torch.mm(grad.T, y.view(-1, dim)).to(out_weight.dtype)
    dout_bias = column_sums(grad, out_bias)
    dy = torch.mm(grad, last).view(x.shape)
    dqkv = torch.empty_like(qkv)
    (q, k, v), grads = (_split(t, x.shape, len(decay)) for t in (qkv, dqkv))
    cuda.backward(dy.view(q.shape), q, k, v, decay, turns, rows, whole, grads)
    lepe.add(dy, lepe_weight, None, grads[2].flatten(3), forward=False)
    dlepe, dlepe_bias = lepe.parameter_backward(dy, v.flatten(3), lepe_weight, lepe_bias)
    dbias = column_sums(dqkv, q_bias.new_empty(3 * dim))
    weights = torch.mm(dqkv.T, flat).chunk(3)
    biases = dbias.chunk(3)
    of_projections = [part.to(like.dtype, copy=True) for part, like in zip(
        (t for pair in zip(weights, biases, strict=True) for t in pair),
        (q_weight, q_bias, k_weight, k_bias, v_weight, v_bias), strict=True)]
    dx = torch.mm(dqkv, weight).view(x.shape)
    return dx, *of_projections, dlepe, dlepe_bias, dout, dout_bias


def _fake(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, lepe_weight, lepe_bias,
          out_weight, out_bias, decay, turns, whole, save):
    size = prod(x.shape[:3])
    heads = (*x.shape[:3], decay.shape[0], x.shape[3] // decay.shape[0])
    return (x.new_empty(x.shape), x.new_empty((size, 3 * x.shape[3]) if save else (0,)),
            x.new_empty(heads if save and not whole else (0,)),
            x.new_empty(x.shape if save else (0,)))


def _count_flops(x, decay, whole, **_) -> int:
    batch, height, width, dim = x
    seen = height * width if whole else height + width
    return 2 * prod(x) * (4 * dim + 25 + 2 * seen)


_masa_mixer = define_op(
    'masa_mixer',
    '(Tensor x, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, Tensor v_weight, '
    'Tensor v_bias, Tensor lepe_weight, Tensor lepe_bias, Tensor out_weight, Tensor out_bias, '
    'Tensor decay, Tensor? turns, bool whole, bool save) -> '
    '(Tensor result, Tensor qkv, Tensor rows, Tensor y)',
    reference=by_steps,
    fake=_fake,
    implementations={'cuda': Implementation(_forward, _backward, _why_not, saves=True)},
    saves='x q_weight q_bias k_weight k_bias v_weight v_bias lepe_weight lepe_bias out_weight '
          'out_bias decay turns qkv rows y whole',
    no_grad='decay turns',
    flops=_count_flops)


def masa_mixer(x: Tensor, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor],
               v: tuple[Tensor, Tensor], lepe: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor],
               decay: Tensor, turns: Tensor | None, form: str, *,
               masks: Sequence[Tensor] | None = None) -> Tensor:
    """Manhattan self-attention with all that is around it in RMT (arXiv 2309.11523, figure 3).

    Queries, keys and values of ``x``, :func:`masa` of them plus a depthwise 5x5 convolution of the
    values, and the last product. On an NVIDIA GPU, where the kernels of ``masa`` take the inputs,
    that is one product for queries, keys and values, the kernels, and the last product; else these
    steps by PyTorch.

    Args:
        x: (B, H, W, C).
        q, k, v, out: weight (C, C) and bias (C) of each projection.
        lepe: weight (C, 1, 5, 5) and bias (C) of the convolution.
        decay, turns, form, masks: as of :func:`masa`.

    Returns:
        (B, H, W, C), in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: if the shapes do not fit one another, or on another ``form``.

    Example, of two heads:
        >>> x, decay, square = torch.randn(1, 3, 5, 8), torch.tensor([-0.3, -0.1]), torch.eye(8)
        >>> linear, lepe = (square, torch.zeros(8)), (torch.zeros(8, 1, 5, 5), torch.zeros(8))
        >>> masa_mixer(x, linear, linear, linear, lepe, linear, decay, None, 'whole').shape
        torch.Size([1, 3, 5, 8])
    """
    dim = x.shape[-1]
    shapes = [t.shape for t in (*q, *k, *v, *out, *lepe)]
    if x.dim() != 4 or shapes != [(dim, dim), (dim,)] * 4 + [(dim, 1, 5, 5), (dim,)]:
        raise ValueError('masa_mixer expects x (B, H, W, C), weights (C, C) with biases (C), and '
                         f'(C, 1, 5, 5) with (C) of lepe; got x {tuple(x.shape)}, and '
                         f'{[*map(tuple, shapes)]}')
    if decay.dim() != 1 or decay.shape[0] < 1 or dim % decay.shape[0]:
        raise ValueError(f'masa_mixer expects decay (n), n a divisor of the {dim} channels, got '
                         f'{tuple(decay.shape)}')
    heads = decay.shape[0]
    check_places((*x.shape[:3], heads, dim // heads), turns, form, masks)
    return _masa_mixer(x, *q, *k, *v, *lepe, *out, decay, turns, form == 'whole',
                       otherwise=functools.partial(by_steps, masks=masks))
