"""A whole VSS block as one op: a small batch waits for Python, not for the GPU."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops import walk
from vmamba_mm.ops.add_norm import cuda as norm
from vmamba_mm.ops.channels import WIDEST
from vmamba_mm.ops.dwconv import cuda as dwconv
from vmamba_mm.ops.mlp import cuda as mlp
from vmamba_mm.ops.registration import register
from vmamba_mm.ops.ss2d_scan import cuda as scan
from vmamba_mm.ops.ss2d_scan.op import _fwd_flops


def why_not(x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> str | None:
    """What keeps :func:`vss_block` from taking these inputs, or None; ``tensors`` are its
    parameters without the bias of the convolution."""
    in_proj, x_proj, dt_projs, hidden = tensors[2], tensors[4], tensors[5], tensors[14]
    dim, inner, wide = x.shape[3], in_proj.shape[0], hidden.shape[0]
    if dtype not in (torch.float16, torch.bfloat16) or x_proj.shape[1] != dt_projs.shape[2] + 2:
        return 'it takes a state of 1 and matrix products in half precision'
    if dim % 4 or inner % 4 or wide % 4 or max(dim, inner) > WIDEST:
        return f'{dim} channels, {inner} inner and {wide} hidden ones: it takes multiples of 4 ' \
               f'up to {WIDEST}'
    if x.shape[1] * x.shape[2] * inner >= 2**31:
        return 'a sample has 2^31 elements or more'
    if not walk.CODES.keys() >= {t.dtype for t in tensors}:
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    return walk.why_not(x, dt_projs.shape[2], 1)


def _run(x, parameters, scales, eps, dtype, out_dtype, save):
    """The result, and what the backward needs beside the inputs, in its order, if ``save``."""
    (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
     out_norm_bias, out_proj, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias, conv_bias
     ) = parameters
    in_proj, out_proj, fc1, bias1, fc2, bias2 = mlp.cast(
        (in_proj, out_proj, fc1, fc1_bias, fc2, fc2_bias), dtype)
    batch, height, width, dim = x.shape
    normed1, moments1 = norm.forward(x, None, None, norm1, norm1_bias, eps, dtype, save)[1:]
    before = torch.mm(normed1.view(-1, dim), in_proj.T).view(batch, height, width, -1)
    inner = dwconv.forward(before, conv, conv_bias)
    y, *kept = scan.forward_norm(inner.permute(0, 3, 1, 2), x_proj, dt_projs, dt_bias, A_logs, D,
                                 out_norm, out_norm_bias, eps, save, logs=True)
    y = y.permute(0, 2, 3, 1).reshape(-1, inner.shape[3])
    branch = torch.mm(y, out_proj.T).view(x.shape)
    total, normed2, moments2 = norm.forward(x, branch, scales[0], norm2, norm2_bias, eps, dtype,
                                            save)
    hidden = torch.addmm(bias1, normed2.view(-1, dim), fc1.T)
    active = torch.nn.functional.gelu(hidden) if save else torch.ops.aten.gelu_(hidden)
    branch = torch.addmm(bias2, active, fc2.T).view(x.shape)
    result = norm.forward(total, branch, scales[1], None, None, eps, out_dtype, False)[0]
    return result, (normed1, moments1, before, inner, *kept, total, normed2, moments2, hidden)


@register('vss_block', fake=lambda x, *args: torch.empty_like(x, dtype=args[-1]))
def _inference(x: Tensor, parameters: list[Tensor], conv_bias: Tensor | None, eps: float,
               dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    return _run(x, (*parameters, conv_bias), (None, None), eps, dtype, out_dtype, False)[0]


def _bwd_fake(grad, x, *args):
    *parameters, scale1, scale2 = args[:21]
    return (x.new_empty(x.shape),
            *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters))


@register('vss_block_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, norm1: Tensor, norm1_bias: Tensor, in_proj: Tensor,
         conv: Tensor, x_proj: Tensor, dt_projs: Tensor, dt_bias: Tensor, A_logs: Tensor,
         D: Tensor, out_norm: Tensor, out_norm_bias: Tensor, out_proj: Tensor, norm2: Tensor,
         norm2_bias: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor,
         conv_bias: Tensor | None, scale1: Tensor | None, scale2: Tensor | None,
         normed1: Tensor, moments1: Tensor, before: Tensor, inner: Tensor, projected: Tensor,
         kept: Tensor, merged: Tensor, total: Tensor, normed2: Tensor, moments2: Tensor,
         hidden: Tensor, eps: float
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor]:
    """Gradients by x and the parameters."""
    dtype, dim = normed1.dtype, x.shape[3]
    half_in, half_out = mlp.cast((in_proj, out_proj), dtype)
    branch = norm.scaled(grad, scale2, dtype)
    dnormed2, dfc1, dbias1, dfc2, dbias2 = mlp.backward(branch, normed2, hidden, fc1, fc1_bias,
                                                        fc2, fc2_bias)
    dx, branch, dnorm2, dnorm2_bias = norm.backward(
        dnormed2, total, moments2, norm2, norm2_bias, grad.to(x.dtype), scale1, dtype)
    branch = branch.view(-1, dim)
    # What out_proj took is calculated again, from the map before its norm.
    before_norm = merged[:inner.numel()].view(-1, inner.shape[3])
    y = norm.forward(before_norm, None, None, out_norm, out_norm_bias, eps, dtype, False)[1]
    dy = torch.mm(branch, half_out).view(inner.shape).permute(0, 3, 1, 2)
    dout = torch.mm(branch.T, y).to(out_proj.dtype)
    del y
    dinner, *dscan = scan.backward_norm(dy, inner.permute(0, 3, 1, 2), x_proj, dt_projs, dt_bias,
                                        A_logs, D, out_norm, out_norm_bias, projected, kept,
                                        merged, logs=True)
    dbefore, dconv, dconv_bias = dwconv.backward(dinner.permute(0, 2, 3, 1), before, conv,
                                                 conv_bias)
    dbefore = dbefore.view(-1, inner.shape[3])
    din = torch.mm(dbefore.T, normed1.view(-1, dim)).to(in_proj.dtype)
    dx, _, dnorm1, dnorm1_bias = norm.backward(
        torch.mm(dbefore, half_in).view(x.shape), x, moments1, norm1, norm1_bias, dx, None, None)
    return (dx, dnorm1, dnorm1_bias, din, dconv, *dscan, dout, dnorm2, dnorm2_bias, dfc1, dbias1,
            dfc2, dbias2, dconv_bias)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:22], *output[1:])
    ctx.eps = inputs[22]


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    dx, *grads, dconv_bias = _bwd(grad, *saved, ctx.eps)
    if saved[19] is None:
        dconv_bias = None
    return dx, *grads, dconv_bias, *[None] * 5


def _fwd_fake(x, *args):
    parameters, (dtype, out_dtype) = args[:18], args[22:]
    batch, height, width, dim = x.shape
    inner, pixels = len(parameters[2]), batch * height * width
    routes, _, rank = parameters[5].shape

    def half(*shape):
        return x.new_empty(shape, dtype=dtype)

    def moments():
        return x.new_empty((pixels, 2), dtype=torch.float32)

    maps = half(batch, inner, height, width)
    projected, kept, _ = scan.saved(maps, rank, routes, 1, True)
    return (x.new_empty(x.shape, dtype=out_dtype), half(*x.shape), moments(),
            half(*x.shape[:3], inner), half(*x.shape[:3], inner), half(*projected), half(*kept),
            half(scan.merged_size(maps)), x.new_empty(x.shape), half(*x.shape), moments(),
            half(pixels, len(parameters[14])))


@register('vss_block_fwd', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _training(x: Tensor, norm1: Tensor, norm1_bias: Tensor, in_proj: Tensor, conv: Tensor,
              x_proj: Tensor, dt_projs: Tensor, dt_bias: Tensor, A_logs: Tensor, D: Tensor,
              out_norm: Tensor, out_norm_bias: Tensor, out_proj: Tensor, norm2: Tensor,
              norm2_bias: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor,
              conv_bias: Tensor | None, scale1: Tensor | None, scale2: Tensor | None, eps: float,
              dtype: torch.dtype, out_dtype: torch.dtype
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                         Tensor, Tensor, Tensor]:
    """The result, and what ``_run`` keeps."""
    parameters = (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
                  out_norm_bias, out_proj, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
                  conv_bias)
    result, kept = _run(x, parameters, (scale1, scale2), eps, dtype, out_dtype, True)
    return result, *kept


def vss_block(x: Tensor, parameters: tuple[Tensor, ...], conv_bias: Tensor | None,
              scales: tuple[Tensor | None, Tensor | None], eps: float, dtype: torch.dtype,
              out_dtype: torch.dtype) -> Tensor:
    """``x + ss2d(norm(x))``, then ``x + mlp(norm(x))``, for inputs for which ``why_not`` is None.

    For its backward it keeps the input, both norms' results, the sum between, three maps within
    SS2D with the projected input, and what GELU takes; it calculates GELU, SiLU's input, the scan
    and the map that out_proj takes again.

    Args:
        x: (B, H, W, C), the residual sum.
        parameters: weight and bias of the first norm, in_proj (D, C), weight of the convolution,
            x_proj, dt_projs and its bias, A_logs (K*D, 1), D, weight and bias of out_norm,
            out_proj (C, D), those of the second norm, of fc1 and of fc2.
        conv_bias: (D), or None.
        scales: (B), fp32, factors of the two branches, or None for 1.
        eps: of the three norms.
        dtype: of the matrix products, fp16 or bf16.
        out_dtype: of the result.

    Returns:
        (B, H, W, C).
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in parameters)) \
            or any(scale is not None for scale in scales):
        return _training(x, *parameters, conv_bias, *scales, eps, dtype, out_dtype)[0]
    return _inference(x, list(parameters), conv_bias, eps, dtype, out_dtype)


def _block_flops(x_shape, in_proj, x_proj, dt_projs, A_logs, fc1) -> int:
    batch, height, width, dim = x_shape
    pixels, inner = batch * height * width, in_proj[0]
    return (2 * pixels * (2 * inner * dim + 9 * inner + 2 * fc1[0] * dim)
            + _fwd_flops((batch, inner, height, width), x_proj, dt_projs, None, A_logs))


@register_flop_formula(torch.ops.vmamba_mm.vss_block)
def _flops(x_shape, shapes, *args, out_shape=None, **kwargs) -> int:
    return _block_flops(x_shape, *(shapes[i] for i in (2, 4, 5, 7, 14)))


@register_flop_formula(torch.ops.vmamba_mm.vss_block_fwd)
def _training_flops(x_shape, *shapes, out_shape=None, **kwargs) -> int:
    return _flops(x_shape, shapes)


@register_flop_formula(torch.ops.vmamba_mm.vss_block_bwd)
def _bwd_flops(grad_shape, x_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x_shape, shapes)
