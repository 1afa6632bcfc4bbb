"""The whole of an SS2D module as one op for inference: a small batch waits for Python, not for the
GPU."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops import walk
from vmamba_mm.ops.dwconv import cuda as dwconv
from vmamba_mm.ops.mlp.cuda import cast
from vmamba_mm.ops.registration import register
from vmamba_mm.ops.ss2d_scan import cuda
from vmamba_mm.ops.ss2d_scan.op import _fwd_flops


def why_not(x: Tensor, in_proj_weight: Tensor, *others: Tensor | None) -> str | None:
    """What keeps :func:`ss2d` from taking these inputs, or None."""
    tensors = (x, in_proj_weight, *others)
    inner, rank, state = len(in_proj_weight), others[3].shape[2], others[5].shape[1]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return 'it has no backward'
    if state != 1 or x.dtype not in (torch.float16, torch.bfloat16):
        return 'it takes a state of 1 and half precision'
    if inner % 4 or inner > 4096 or x.numel() // len(x) // x.shape[3] * inner >= 2**31:
        return f'{inner} inner channels, or too large a map'
    if any(t is not None and t.dtype not in walk.CODES for t in tensors):
        return 'an input is neither float32 nor float16 nor bfloat16'
    return walk.why_not(x, rank, 1)


@register('ss2d', fake=lambda x, *args: x.new_empty((*x.shape[:3], len(args[-1]))))
def ss2d(x: Tensor, in_proj_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None,
         x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor,
         D: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, out_proj_weight: Tensor
         ) -> Tensor:
    """in_proj -> ``dwconv_silu`` -> ``ss2d_scan_norm`` -> out_proj, for inputs for which
    ``why_not`` is None; no backward.

    Args:
        x: (B, H, W, C), fp16 or bf16, the dtype of the matrix products and of the result.
        in_proj_weight: (D, C).
        conv_weight, conv_bias: as in ``dwconv_silu``.
        A_logs: (K*D, 1): A is ``-exp(A_logs)``.
        out_proj_weight: (C, D).
        Others as in ``ss2d_scan_norm``.

    Returns:
        (B, H, W, C).
    """
    half_in, half_out = cast([in_proj_weight, out_proj_weight], x.dtype)
    batch, height, width, dim = x.shape
    inner = torch.mm(x.reshape(-1, dim), half_in.T).view(batch, height, width, -1)
    inner = dwconv.forward(inner, conv_weight, conv_bias).permute(0, 3, 1, 2)
    y = cuda.forward_norm(inner, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, D,
                          norm_weight, norm_bias, eps, False, logs=True)[0]
    return torch.mm(y.permute(0, 2, 3, 1).view(-1, y.shape[1]), half_out.T).view(
        batch, height, width, -1)


@register_flop_formula(torch.ops.vmamba_mm.ss2d)
def _flops(x_shape, in_shape, conv_shape, conv_bias_shape, x_proj_shape, dt_projs_shape,
           dt_bias_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, dim = x_shape
    pixels, inner = batch * height * width, in_shape[0]
    return (2 * pixels * inner * (dim + 9 + out_shape[-1])
            + _fwd_flops((batch, inner, height, width), x_proj_shape, dt_projs_shape,
                         dt_bias_shape, A_shape))
