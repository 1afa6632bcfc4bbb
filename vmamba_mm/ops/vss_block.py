"""A whole VSS block as one op for inference: a small batch waits for Python, not for the GPU."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops import walk
from vmamba_mm.ops.add_norm.cuda import forward as add_norm
from vmamba_mm.ops.dwconv.cuda import forward as dwconv_silu
from vmamba_mm.ops.mlp.cuda import cast
from vmamba_mm.ops.registration import register
from vmamba_mm.ops.ss2d_scan.cuda import forward_norm
from vmamba_mm.ops.ss2d_scan.op import _fwd_flops

_WIDEST = 4096  # channels


def why_not(x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> str | None:
    """What keeps :func:`vss_block` from taking these inputs, or None; ``tensors`` are those of it
    after ``x``, without a bias of the convolution that is None."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        return 'it has no backward'
    in_proj, x_proj, dt_projs, hidden = tensors[2], tensors[4], tensors[5], tensors[14]
    dim, inner = x.shape[3], len(in_proj)
    if dtype not in (torch.float16, torch.bfloat16) or x_proj.shape[1] != dt_projs.shape[2] + 2:
        return 'it takes a state of 1 and matrix products in half precision'
    if dim % 4 or inner % 4 or len(hidden) % 4 or max(dim, inner) > _WIDEST:
        return f'{dim} channels, {inner} inner and {len(hidden)} hidden ones: it takes multiples ' \
               f'of 4 up to {_WIDEST}'
    if x.numel() // len(x) // dim * inner >= 2**31:
        return 'a sample has 2^31 elements or more'
    if any(t.dtype not in walk.CODES for t in tensors):
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    return walk.why_not(x, dt_projs.shape[2], 1)


@register('vss_block', fake=lambda x, *args: torch.empty_like(x, dtype=args[-1]))
def vss_block(x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor, in_proj_weight: Tensor,
              conv_weight: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
              dt_projs_bias: Tensor, A_logs: Tensor, D: Tensor, out_norm_weight: Tensor,
              out_norm_bias: Tensor, out_proj_weight: Tensor, norm2_weight: Tensor,
              norm2_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
              fc2_bias: Tensor, conv_bias: Tensor | None, eps: float, dtype: torch.dtype,
              out_dtype: torch.dtype) -> Tensor:
    """``x + ss2d(norm(x))``, then ``x + mlp(norm(x))``, for inputs for which ``why_not`` is None;
    no backward.

    Args:
        x: (B, H, W, C).
        A_logs: (K*D, 1): A is ``-exp(A_logs)``.
        eps: of the three norms.
        dtype: of the matrix products, fp16 or bf16.
        out_dtype: of the result.
        Others as in ``dwconv_silu``, ``ss2d_scan_norm`` and ``mlp``.

    Returns:
        (B, H, W, C).
    """
    in_proj, out_proj, fc1, bias1, fc2, bias2 = cast(
        (in_proj_weight, out_proj_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias), dtype)
    batch, height, width, dim = x.shape
    normed = add_norm(x, None, None, norm1_weight, norm1_bias, eps, dtype, False)[1]
    inner = torch.mm(normed.view(-1, dim), in_proj.T).view(batch, height, width, -1)
    inner = dwconv_silu(inner, conv_weight, conv_bias).permute(0, 3, 1, 2)
    inner = forward_norm(inner, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, D,
                         out_norm_weight, out_norm_bias, eps, False, logs=True)[0]
    branch = torch.mm(inner.permute(0, 2, 3, 1).view(-1, inner.shape[1]), out_proj.T)
    x, normed, _ = add_norm(x, branch.view(x.shape), None, norm2_weight, norm2_bias, eps, dtype,
                            False)
    hidden = torch.addmm(bias1, normed.view(-1, dim), fc1.T)
    branch = torch.addmm(bias2, torch.ops.aten.gelu_(hidden), fc2.T)
    return add_norm(x, branch.view(x.shape), None, None, None, eps, out_dtype, False)[0]


@register_flop_formula(torch.ops.vmamba_mm.vss_block)
def _flops(x_shape, norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_shape, D,
           out_norm, out_norm_bias, out_proj, norm2, norm2_bias, fc1, *args, out_shape=None,
           **kwargs) -> int:
    batch, height, width, dim = x_shape
    pixels, inner = batch * height * width, in_proj[0]
    return (2 * pixels * (2 * inner * dim + 9 * inner + 2 * fc1[0] * dim)
            + _fwd_flops((batch, inner, height, width), x_proj, dt_projs, dt_bias, A_shape))
