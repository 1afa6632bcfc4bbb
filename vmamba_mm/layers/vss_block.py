"""The VSS block and a stage of blocks (section 4.2 and figure 3, arXiv 2401.10166)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import is_depthwise_3x3, is_plain
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.ops import add_norm, mlp
from vmamba_mm.ops.backends import autocast_dtype
from vmamba_mm.ops.vss_block import vss_block, vss_blocks, why_not


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        if hidden < 1:
            raise ValueError(f'mlp_ratio must be 0 (no MLP) or at least 1/{dim} for {dim} channels')
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
        autocast = autocast_dtype(x)
        scales = self.drop_path.factors(x, 1 if self.mlp is None else 2)
        out_dtype = autocast if self.feeds_matmul else None
        if (parameters := self._in_one_op(x, autocast or x.dtype)) is not None:
            return vss_block(x, parameters, self.ssm.conv2d.bias, scales, self.norm1.eps,
                             autocast or x.dtype, out_dtype or x.dtype)
        branch = self.ssm(self.norm1(x))
        if self.mlp is not None:
            x, normed = self.norm2(x, branch, scales[0])
            branch = self.mlp(normed)
        return add_norm(x, branch, None, None, scale=scales[-1], out_dtype=out_dtype)[0]

    def _in_one_op(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The parameters for the op ``vss_block``, or None where it does not apply."""
        # Past nn.Module.__getattr__, which would take a tenth of the block's time in Python.
        own = self._modules
        ssm, mlp = own['ssm'], own.get('mlp')  # None is no module
        if mlp is None or not (is_plain(ssm, SS2D) and is_plain(mlp, Mlp)) \
                or ssm.gate or ssm.act != 'silu' or ssm.scan != 'cross':
            return None
        inner, outer = ssm._modules, mlp._modules
        modules = (own['norm1'], inner['in_proj'], inner.get('conv2d'), inner['out_norm'],
                   inner['out_proj'], own['norm2'], outer['fc1'], outer['fc2'])
        if not (all(map(is_plain, modules, _KINDS)) and is_depthwise_3x3(inner['conv2d'])):
            return None
        norm1, in_proj, conv, out_norm, out_proj, norm2, fc1, fc2 = (
            module._parameters for module in modules)
        routes = ssm._parameters
        tensors = (norm1['weight'], norm1['bias'], in_proj['weight'], conv['weight'],
                   routes['x_proj_weight'], routes['dt_projs_weight'], routes['dt_projs_bias'],
                   routes['A_logs'], routes['Ds'], out_norm['weight'], out_norm['bias'],
                   out_proj['weight'], norm2['weight'], norm2['bias'], fc1['weight'], fc1['bias'],
                   fc2['weight'], fc2['bias'])
        return None if why_not(x, dtype, tensors) else tensors

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


# Of a block's modules, as in _in_one_op.
_KINDS = (LayerNorm, nn.Linear, nn.Conv2d, LayerNorm, nn.Linear, LayerNorm, nn.Linear, nn.Linear)


class VSSStage(nn.Module):
    """Blocks at one resolution, and the downsampling that follows them (None in the last stage).

    Shape of the blocks: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def run_blocks(self, x: Tensor) -> Tensor:
        """``blocks(x)``, in inference on an NVIDIA GPU as one op."""
        return self.blocks(x) if (y := self._in_one_op(x)) is None else y

    def _in_one_op(self, x: Tensor) -> Tensor | None:
        """The result, or None where the op ``vss_blocks`` does not apply."""
        if torch.is_grad_enabled() or not is_plain(self.blocks, nn.Sequential):
            return None
        blocks, autocast = list(self.blocks), autocast_dtype(x)
        dtype, parameters = autocast or x.dtype, []
        for block in blocks:
            drop_path = block.drop_path
            if not is_plain(block, VSSBlock) or drop_path.training and drop_path.drop_prob > 0:
                return None
            if (own := block._in_one_op(x, dtype)) is None:
                return None
            parameters.append(own)
        biases = [bias for block in blocks if (bias := block.ssm.conv2d.bias) is not None]
        kinds = [(block.norm1.eps, *[t.dtype for t in own])
                 for block, own in zip(blocks, parameters, strict=True)]
        if any(kind != kinds[0] for kind in kinds) or len(biases) not in (0, len(blocks)) \
                or any(block.feeds_matmul for block in blocks[:-1]):
            return None
        out_dtype = autocast if blocks[-1].feeds_matmul else None
        return vss_blocks(x, parameters, biases, blocks[0].norm1.eps, dtype, out_dtype or x.dtype)
