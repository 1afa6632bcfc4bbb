"""LayerNorm and RMSNorm of the last dimension, and the residual sum before them."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.plain import is_plain
from vmamba_mm.ops import add_norm, layer_norm, rms_norm
from vmamba_mm.ops.core.backends import autocast_dtype, compute_dtype

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('add_norm')
torch.fx.wrap('layer_norm')
torch.fx.wrap('rms_norm')
torch.fx.wrap('autocast_dtype')
torch.fx.wrap('gated_rms_norm')


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` of the last dimension; on an NVIDIA GPU one kernel.

    Args:
        dim: C.
        feeds_matmul: under autocast the result has autocast's dtype, to which the product that
            takes it would round it anyway; else it is fp32, as autocast has it.
        eps: added to the variance.

    Shape: (B, ..., C) -> (B, ..., C).
    """

    def __init__(self, dim: int, feeds_matmul: bool = False, eps: float = 1e-5):
        super().__init__(dim, eps=eps)
        self.feeds_matmul = feeds_matmul

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.out_dtype(x)
        if self.bias is None:  # somebody has taken it away; to the op that would be an RMSNorm
            y = super().forward(x)
            return y if dtype is None else y.to(dtype)
        return layer_norm(x, self.weight, self.bias, self.eps, out_dtype=dtype)

    def out_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype of the result, for the ops; None for their default."""
        return autocast_dtype(x) if self.feeds_matmul else None


class LayerNorm2d(LayerNorm):
    """The same over the channels of an output: (B, C, H, W) -> (B, C, H, W), where a hook sees
    what tools that draw class activation maps expect."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` of the last dimension (arXiv 1910.07467), computed in fp32 at least; on an
    NVIDIA GPU one kernel.

    Args:
        dim: C.
        eps: added to the mean square.

    Shape: (B, ..., C) -> (B, ..., C), in the dtype of the input, or fp32 under autocast.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNormGated(nn.RMSNorm):
    """RMSNorm of groups of channels and a gate SiLU(z), in fp32 at least (Mamba-2, arXiv
    2405.21060, section 7.2).

    Args:
        dim: C.
        group_size: channels that are normalised together; None for all. It must divide C.
        norm_before_gate: RMSNorm(x) * weight * SiLU(z), not RMSNorm(x * SiLU(z)) * weight.
        eps: added to the mean square.

    Shape: (B, ..., C), twice with a gate -> (B, ..., C), in the dtype of the input.

    Raises:
        ValueError: if ``group_size`` does not divide ``dim``.
    """

    def __init__(self, dim: int, group_size: int | None = None, norm_before_gate: bool = False,
                 eps: float = 1e-5):
        super().__init__(dim, eps=eps)
        self.group_size = dim if group_size is None else group_size
        if self.group_size < 1 or dim % self.group_size:
            raise ValueError(f'group_size={group_size!r} must divide the {dim} channels')
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(x, self.weight, z, self.eps, group_size=self.group_size,
                              norm_before_gate=self.norm_before_gate)


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor | None = None, eps: float = 1e-5, *,
                   group_size: int | None = None, norm_before_gate: bool = False) -> Tensor:
    """:class:`RMSNormGated` as a function.

    Args:
        x: (B, ..., C).
        weight: (C).
        z: (B, ..., C), or None for no gate.
        eps, group_size, norm_before_gate: as there.

    Returns:
        (B, ..., C) in the dtype of ``x``.
    """
    y = x.to(compute_dtype(x.dtype))
    gate = None if z is None else F.silu(z.to(y.dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    if group_size in (None, y.shape[-1]):
        y = rms_norm(y, weight, eps, out_dtype=y.dtype)
    else:
        groups = y.unflatten(-1, (-1, group_size))
        scale = torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)
        y = (groups * scale).flatten(-2) * weight.to(y.dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def sum_and_norm(norm: nn.Module, x: Tensor, branch: Tensor, scale: Tensor | None = None,
                 out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``x + scale * branch`` and ``norm`` of it, on an NVIDIA GPU in one pass.

    Args:
        norm: a norm of the last dimension.
        x, branch: (B, ..., C).
        scale: (B), or None for 1.
        out_dtype: of the norm's result; None for what ``norm`` itself gives.
    """
    if is_plain(norm, RMSNorm):
        return add_norm(x, branch, norm.weight, None, norm.eps, scale=scale, out_dtype=out_dtype)
    if is_plain(norm, LayerNorm) and norm.bias is not None:
        return add_norm(x, branch, norm.weight, norm.bias, norm.eps, scale=scale,
                        out_dtype=norm.out_dtype(x) if out_dtype is None else out_dtype)
    total = add_norm(x, branch, None, None, scale=scale)[0]
    normed = norm(total)
    return total, normed if out_dtype is None else normed.to(out_dtype)
