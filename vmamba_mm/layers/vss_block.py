"""The VSS block and a stage of blocks (section 4.2 and figure 3, arXiv 2401.10166)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.norm import LayerNorm, matmul_dtype
from vmamba_mm.layers.plain import is_plain
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.ops import add_norm, mlp


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
        branch = self.ssm(self.norm1(x))
        if self.mlp is not None:
            x, normed = self.norm2(x, branch, self.drop_path.factors(x))
            branch = self.mlp(normed)
        return add_norm(x, branch, None, None, scale=self.drop_path.factors(x),
                        out_dtype=matmul_dtype(x) if self.feeds_matmul else None)[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class VSSStage(nn.Module):
    """Blocks at one resolution, and the downsampling that follows them (None in the last stage).

    Shape of the blocks: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample
