"""The VSS block and a stage of blocks (section 4.2 and figure 3, arXiv 2401.10166)."""

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.norm import LayerNorm, sum_and_norm
from vmamba_mm.layers.plain import Attributes, are_plain, is_depthwise_3x3, is_plain
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.ops import add_norm, mlp
from vmamba_mm.ops.core.backends import autocast_dtype, runs_kernels, wants_grad
from vmamba_mm.ops.vss_block import vss_block, vss_blocks, why_not

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('add_norm')
torch.fx.wrap('autocast_dtype')
torch.fx.wrap('mlp')


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        if hidden < 1:
            raise ValueError(f'mlp_ratio must be 0 (no MLP) or at least 1/{dim} for {dim} channels')
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if is_plain(fc1, nn.Linear) and is_plain(fc2, nn.Linear) \
                and fc1.bias is not None and fc2.bias is not None:
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(F.gelu(fc1(x)))


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
        out_dtype = autocast if self.feeds_matmul else None
        drop, scales = self.drop_path, (None, None)
        if is_plain(drop, DropPath):  # then the factors go into the sums
            drop, scales = _keep, drop.factors(x, 1 if self.mlp is None else 2)
            if runs_kernels(x) and (
                    parameters := self._in_one_op(x, autocast or x.dtype)) is not None:
                return vss_block(x, parameters, self.ssm.conv2d.bias, scales, self.norm1.eps,
                                 autocast or x.dtype, out_dtype or x.dtype)
        branch = drop(self.ssm(self.norm1(x)))
        if self.mlp is not None:
            x, normed = sum_and_norm(self.norm2, x, branch, scales[0])
            branch = drop(self.mlp(normed))
        return add_norm(x, branch, None, None, scale=scales[-1], out_dtype=out_dtype)[0]

    def _in_one_op(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The parameters for the op ``vss_block``, or None where it does not apply."""
        # Past nn.Module.__getattr__, which would take a tenth of the block's time in Python.
        own = self._modules
        ssm, mlp = own['ssm'], own.get('mlp')  # None is no module
        if type(ssm) is not SS2D or type(mlp) is not Mlp \
                or ssm.gate or ssm.act != 'silu' or ssm.scan != 'cross':
            return None
        inner, outer = ssm._modules, mlp._modules
        modules = (mlp, ssm, own['norm1'], inner['in_proj'], inner.get('conv2d'),
                   inner['out_norm'], inner['out_proj'], own['norm2'], outer['fc1'], outer['fc2'])
        if not (are_plain(modules, _KINDS) and is_depthwise_3x3(inner['conv2d'])) \
                or not own['norm1'].eps == inner['out_norm'].eps == own['norm2'].eps:
            return None
        try:
            tensors = _parameters_of(*[module._parameters for module in modules[1:]])
        except KeyError:
            tensors = _parameters_of(*map(Attributes, modules[1:]))
        return None if tensors is None or why_not(x, dtype, tensors) else tensors

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


def _keep(branch: Tensor) -> Tensor:
    return branch


def _parameters_of(ssm, norm1, in_proj, conv, out_norm, out_proj, norm2, fc1, fc2
                   ) -> tuple[Tensor, ...] | None:
    """Of a block's modules, as :func:`vss_block` takes them; None if a user has put a norm or a
    Linear in the place of ours that has a bias more or less."""
    if in_proj['bias'] is not None or out_proj['bias'] is not None:
        return None
    biases = norm1['bias'], out_norm['bias'], norm2['bias'], fc1['bias'], fc2['bias']
    for bias in biases:
        if bias is None:
            return None
    return (norm1['weight'], biases[0], in_proj['weight'], conv['weight'], ssm['x_proj_weight'],
            ssm['dt_projs_weight'], ssm['dt_projs_bias'], ssm['A_logs'], ssm['Ds'],
            out_norm['weight'], biases[1], out_proj['weight'], norm2['weight'], biases[2],
            fc1['weight'], biases[3], fc2['weight'], biases[4])


# Of a block's modules, as in _in_one_op.
_KINDS = (Mlp, SS2D, LayerNorm, nn.Linear, nn.Conv2d, LayerNorm, nn.Linear, LayerNorm, nn.Linear,
          nn.Linear)


class VSSStage(nn.Module):
    """Blocks at one resolution, and the downsampling that follows them (None in the last stage).

    Args of ``forward``:
        x: (B, H, W, C).
        downsample: False to stop before the downsampling.
        with_map: also return the map before the downsampling.

    Shape: (B, H, W, C) -> (B, H', W', 2C); (B, H, W, C) without a downsampling. With ``with_map``
    that, and (B, H, W, C).
    """

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, downsample: bool = True, with_map: bool = False
                ) -> Tensor | tuple[Tensor, Tensor]:
        before = self._run_blocks(x)
        after = self.downsample(before) if downsample and self.downsample is not None else before
        return (after, before) if with_map else after

    def _run_blocks(self, x: Tensor) -> Tensor:
        """``blocks(x)``, in inference on an NVIDIA GPU as one op."""
        y = self._in_one_op(x) if runs_kernels(x) else None
        return self.blocks(x) if y is None else y

    def _in_one_op(self, x: Tensor) -> Tensor | None:
        """The result, or None where the op ``vss_blocks`` does not apply."""
        if torch.jit.is_tracing():  # which runs with and without gradients, and compares
            trains = wants_grad(x, *self.parameters())
        else:
            trains = torch.is_grad_enabled()
        if trains or not is_plain(self.blocks, nn.Sequential):
            return None
        blocks, autocast = list(self.blocks), autocast_dtype(x)
        dtype, parameters = autocast or x.dtype, []
        for block in blocks:
            drop = block._modules.get('drop_path')
            if not are_plain((block, drop), (VSSBlock, DropPath)) \
                    or drop.training and drop.drop_prob > 0:
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
