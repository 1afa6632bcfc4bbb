"""The VSS block and a stage of blocks (section 4.2 and figure 3, arXiv 2401.10166)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import is_plain
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.ops import add_norm, mlp
from vmamba_mm.ops.backends import autocast_dtype
from vmamba_mm.ops.vss_block import vss_block, why_not


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)):
            return self.fc2(F.gelu(self.fc1(x)))
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)) unless ``mlp_ratio`` is 0.

    Args:
        dim: C, channels.
        mlp_ratio: hidden width of the MLP by C; 0 for no MLP branch (vanilla VMamba).
        drop_path: probability to drop a branch, the same for both.
        with_cp: recompute the block in the backward pass to save memory.
        ssm_cfg: keyword arguments of :class:`SS2D`.
        feeds_matmul: whether a matrix product or convolution takes the result, see
            :class:`LayerNorm`.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, with_cp: bool,
                 ssm_cfg: dict, feeds_matmul: bool = False):
        super().__init__()
        self.with_cp = with_cp
        self.feeds_matmul = feeds_matmul
        self.norm1 = LayerNorm(dim, feeds_matmul=True)
        self.ssm = SS2D(dim, **ssm_cfg)
        self.norm2 = LayerNorm(dim, feeds_matmul=True) if mlp_ratio > 0 else None
        self.mlp = Mlp(dim, int(mlp_ratio * dim)) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path)

    def _forward(self, x: Tensor) -> Tensor:
        out_dtype = autocast_dtype(x) if self.feeds_matmul else None
        if (parameters := self._in_one_op(x)) is not None:
            scales = self.drop_path.factors(x), self.drop_path.factors(x)
            return vss_block(x, parameters, self.ssm.conv2d.bias, scales, self.norm1.eps,
                             autocast_dtype(x) or x.dtype, out_dtype or x.dtype)
        branch = self.ssm(self.norm1(x))
        if self.mlp is not None:
            x, normed = self.norm2(x, branch, self.drop_path.factors(x))
            branch = self.mlp(normed)
        return add_norm(x, branch, None, None, scale=self.drop_path.factors(x),
                        out_dtype=out_dtype)[0]

    def _in_one_op(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The parameters for the op ``vss_block``, or None where it does not apply."""
        ssm, mlp = self.ssm, self.mlp
        if not x.is_cuda or mlp is None or ssm.gate or torch.compiler.is_compiling():
            return None
        modules = (self.norm1, ssm, ssm.in_proj, ssm.conv2d, ssm.out_norm, ssm.out_proj,
                   self.norm2, mlp, mlp.fc1, mlp.fc2)
        if not all(map(is_plain, modules, _KINDS)):
            return None
        # Past nn.Module.__getattr__, which would take a tenth of the block's time in Python.
        norm1, own, in_proj, conv, out_norm, out_proj, norm2, _, fc1, fc2 = (
            module._parameters for module in modules)
        tensors = (*norm1.values(), in_proj['weight'], conv['weight'], own['x_proj_weight'],
                   own['dt_projs_weight'], own['dt_projs_bias'], own['A_logs'], own['Ds'],
                   *out_norm.values(), out_proj['weight'], *norm2.values(), *fc1.values(),
                   *fc2.values())
        return None if why_not(x, autocast_dtype(x) or x.dtype, tensors) else tensors

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


# Of a block's modules, as in _in_one_op.
_KINDS = (LayerNorm, SS2D, nn.Linear, nn.Conv2d, LayerNorm, nn.Linear, LayerNorm, Mlp, nn.Linear,
          nn.Linear)


class VSSStage(nn.Module):
    """Blocks at one resolution, and the downsampling that follows them (None in the last stage).

    Shape of the blocks: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample
