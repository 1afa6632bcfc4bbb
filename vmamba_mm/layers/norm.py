"""LayerNorm, with the residual sum before it."""

from torch import Tensor, nn

from vmamba_mm.ops import add_norm, layer_norm
from vmamba_mm.ops.backends import autocast_dtype


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` of the last dimension; on an NVIDIA GPU one kernel, as is the sum before it.

    Args:
        dim: C.
        feeds_matmul: under autocast on an NVIDIA GPU the result has autocast's dtype, to which the
            product that takes it would round it anyway; else it is fp32, as autocast has it.

    Shape: (B, ..., C) -> (B, ..., C). With ``branch`` (B, ..., C), and ``scale`` (B) or None, the
    sum ``x + scale * branch`` and its norm.
    """

    def __init__(self, dim: int, feeds_matmul: bool = False):
        super().__init__(dim)
        self.feeds_matmul = feeds_matmul

    def forward(self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        dtype = autocast_dtype(x) if self.feeds_matmul else None
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps, out_dtype=dtype)
        return add_norm(x, branch, self.weight, self.bias, self.eps, scale=scale, out_dtype=dtype)
