"""``mamba_ssm.ops.triton.layernorm_gated``: norms with a gate, the norms of Mamba-2.

They are calculated in fp32 (fp64 for fp64 input), and a result has the dtype of ``x``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.ops.core.backends import compute_dtype


def layernorm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None,
                 eps: float = 1e-6, group_size: int | None = None, norm_before_gate: bool = True,
                 is_rms_norm: bool = False) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))`` without ``norm_before_gate``.

    Args:
        x, z: (..., C); without ``z`` there is no gate.
        weight: (C). bias: (C), or None.
        group_size: channels that are normalised together, None for all.
    """
    dtype = compute_dtype(x.dtype)
    y, gate = x.to(dtype), None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    grouped = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = grouped.flatten(-2) * weight.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    return (y if gate is None or not norm_before_gate else y * gate).to(x.dtype)


def rmsnorm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None,
               eps: float = 1e-6, group_size: int | None = None, norm_before_gate: bool = True
               ) -> Tensor:
    """:func:`layernorm_fn` with RMSNorm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """LayerNorm with a gate: ``norm(x, z)``; see :func:`layernorm_fn`."""

    is_rms_norm = False

    def __init__(self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None,
                 norm_before_gate: bool = True, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None if self.is_rms_norm else nn.Parameter(
            torch.empty(hidden_size, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size,
                            self.norm_before_gate, self.is_rms_norm)


class RMSNorm(LayerNorm):
    """RMSNorm with a gate, without a bias: ``norm(x, z)``; see :func:`layernorm_fn`."""

    is_rms_norm = True
