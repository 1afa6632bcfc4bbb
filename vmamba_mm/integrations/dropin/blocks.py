"""The residual blocks around a mixer: that of ``mamba_ssm.modules.mamba_simple``, and the later one
of ``mamba_ssm.modules.block`` with an MLP."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmamba_mm.integrations.dropin.norms import RMSNorm, layer_norm_fn

Make = Callable[[int], nn.Module]


class _Block(nn.Module):
    """What both have: the sum, the norm behind it and the mixer's cache."""

    def __init__(self, fused_add_norm: bool, residual_in_fp32: bool):
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm

    def _check_norm(self) -> None:
        if self.fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise ValueError('fused_add_norm takes an nn.LayerNorm or an RMSNorm, got '
                             f'{type(self.norm).__name__}')

    def _sum_and_norm(self, norm: nn.Module, hidden_states: Tensor, residual: Tensor | None
                      ) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden_states, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True,
                residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm))
        residual = hidden_states if residual is None else hidden_states + residual
        normed = norm(residual.to(norm.weight.dtype))
        return normed, residual.float() if self.residual_in_fp32 else residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int,
                                 dtype: torch.dtype | None = None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class Block(_Block):
    """Add -> norm -> mixer, with the residual beside.

    Args:
        dim: C.
        mixer_cls, norm_cls: what make the mixer and the norm from C.
        fused_add_norm: the sum and the norm in fp32, without rounding in between; the norm is an
            ``nn.LayerNorm`` or an RMSNorm of ``mamba_ssm``.
        residual_in_fp32: whether the residual is kept in fp32.
    """

    def __init__(self, dim: int, mixer_cls: Make, norm_cls: Make = nn.LayerNorm,
                 fused_add_norm: bool = False, residual_in_fp32: bool = False):
        super().__init__(fused_add_norm, residual_in_fp32)
        self.mixer = mixer_cls(dim)
        self.norm = norm_cls(dim)
        self._check_norm()

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None,
                inference_params=None) -> tuple[Tensor, Tensor]:
        """The mixer's result and the residual, both (B, L, C); ``residual`` is None at first."""
        hidden_states, residual = self._sum_and_norm(self.norm, hidden_states, residual)
        return self.mixer(hidden_states, inference_params=inference_params), residual


class BlockWithMLP(_Block):
    """Add -> norm -> mixer -> add -> norm -> MLP; the second half is absent where ``mlp_cls`` is
    ``nn.Identity``. Otherwise as :class:`Block`."""

    def __init__(self, dim: int, mixer_cls: Make, mlp_cls: Make, norm_cls: Make = nn.LayerNorm,
                 fused_add_norm: bool = False, residual_in_fp32: bool = False):
        super().__init__(fused_add_norm, residual_in_fp32)
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        self._check_norm()

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None,
                inference_params=None, **mixer_kwargs) -> tuple[Tensor, Tensor]:
        """The last result and the residual, both (B, L, C); ``residual`` is None at first."""
        hidden_states, residual = self._sum_and_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params,
                                   **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._sum_and_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual
