"""The VSS block and a stage of blocks (section 4.2 and figure 3, arXiv 2401.10166).

There are three ways through a stage, with the same result. Inference on an NVIDIA GPU runs all of
its blocks as one op, ``vss_blocks``; else each block runs by itself, as one op, ``vss_block``, or
step by step. ``why_not_one_op`` of a stage or a block says what keeps it from the faster way.
"""

from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.norm import LayerNorm, sum_and_norm
from vmamba_mm.layers.plain import Attributes, are_plain, is_depthwise_3x3, is_plain
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.layers.stage import Stage
from vmamba_mm.ops import add_norm, mlp
from vmamba_mm.ops.core.backends import autocast_dtype, runs_kernels, wants_grad
from vmamba_mm.ops.vss_block import OF_MLP, Weights, vss_block, vss_blocks, why_not

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
        ssm_cfg: keyword arguments of ``ssm_type``.
        ssm_type: :class:`SS2D`, or another layer of such maps, as :class:`SSD2D`.
        feeds_matmul: whether a matrix product or convolution takes the result, see
            :class:`LayerNorm`.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, with_cp: bool,
                 ssm_cfg: dict, ssm_type: type[nn.Module] = SS2D, feeds_matmul: bool = False):
        super().__init__()
        self.with_cp = with_cp
        self.feeds_matmul = feeds_matmul
        self.norm1 = LayerNorm(dim, feeds_matmul=True)
        self.ssm = ssm_type(dim, **ssm_cfg)
        self.norm2 = LayerNorm(dim, feeds_matmul=True) if mlp_ratio > 0 else None
        self.mlp = Mlp(dim, int(mlp_ratio * dim)) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        autocast, drop = autocast_dtype(x), self.drop_path
        out_dtype = autocast if self.feeds_matmul else None
        if not is_plain(drop, DropPath):
            return self._step_by_step(x, drop, (None, None), out_dtype)
        # The factors of a plain drop path go into the sums.
        scales = drop.factors(x, 1 if self.mlp is None else 2)
        weights = _weights_for_op(self, x, autocast)
        if isinstance(weights, str):
            return self._step_by_step(x, _identity, scales, out_dtype)
        return vss_block(x, weights, (*scales, None)[:2], self.norm1.eps, autocast or x.dtype,
                         out_dtype or x.dtype)

    def _step_by_step(self, x: Tensor, drop: Callable[[Tensor], Tensor],
                      scales: tuple[Tensor | None, ...], out_dtype: torch.dtype | None) -> Tensor:
        branch = drop(self.ssm(self.norm1(x)))
        if self.mlp is not None:
            x, normed = sum_and_norm(self.norm2, x, branch, scales[0])
            branch = drop(self.mlp(normed))
        return add_norm(x, branch, None, None, scale=scales[-1], out_dtype=out_dtype)[0]

    def why_not_one_op(self, x: Tensor) -> str | None:
        """The reason why the block does not run as one op on ``x``, but step by step, or None."""
        if not is_plain(self.drop_path, DropPath):
            return _NOT_PLAIN
        weights = _weights_for_op(self, x, autocast_dtype(x))
        return weights if isinstance(weights, str) else None


def _identity(branch: Tensor) -> Tensor:
    return branch


# --- whether a block, or a stage of blocks, runs as one op ----------------------------------------

_NOT_ON_GPU = 'the input is not on a GPU'  # or torch.fx records the steps
_NOT_PLAIN = 'a module has a hook, is wrapped, or is of another class'
# The modules of a block whose parameters the op takes, as in _weights_for_op, and those of its MLP.
_CLASSES = SS2D, LayerNorm, nn.Linear, nn.Conv2d, LayerNorm, nn.Linear
_CLASSES_WITH_MLP = *_CLASSES, LayerNorm, nn.Linear, nn.Linear, Mlp


def _weights_for_op(block: VSSBlock, x: Tensor, autocast: torch.dtype | None) -> Weights | str:
    """The parameters for the op ``vss_block``, or what keeps the block from being that op.

    The op does not drop paths; that is for who calls it to look at.
    """
    if not runs_kernels(x):
        return _NOT_ON_GPU
    # Past nn.Module.__getattr__, which would take a tenth of the block's time in Python.
    block_modules = block._modules
    ssm, mlp = block_modules['ssm'], block_modules.get('mlp')  # None is no module
    if type(ssm) is not SS2D or mlp is not None and type(mlp) is not Mlp:
        return 'its MLP or its SS2D is of another class'
    if ssm.act != 'silu' or ssm.scan != 'cross':
        return 'its SS2D has another activation than SiLU or another scan than cross'
    ssm_modules = ssm._modules
    modules = (ssm, block_modules['norm1'], ssm_modules['in_proj'], ssm_modules.get('conv2d'),
               ssm_modules['out_norm'], ssm_modules['out_proj'])
    if mlp is not None:
        mlp_modules = mlp._modules
        modules += block_modules['norm2'], mlp_modules['fc1'], mlp_modules['fc2'], mlp
    if not are_plain(modules, _CLASSES if mlp is None else _CLASSES_WITH_MLP):
        return _NOT_PLAIN
    if not is_depthwise_3x3(ssm_modules['conv2d']):
        return 'its convolution is not a depthwise one of 3x3 that keeps the size'
    eps = block_modules['norm1'].eps
    if eps != ssm_modules['out_norm'].eps or mlp is not None and eps != block_modules['norm2'].eps:
        return 'its norms differ in eps'
    try:
        weights = _weights_of(*[module._parameters for module in modules[:9]])
    except KeyError:
        weights = _weights_of(*map(Attributes, modules[:9]))
    if weights is None:
        return 'a Linear or a norm has a bias more or less than those of VMamba'
    return why_not(x, autocast or x.dtype, weights) or weights


def _weights_of(ssm, norm1, in_proj, conv, out_norm, out_proj, *of_mlp) -> Weights | None:
    """The weights of a block by those of its modules, and of the MLP's norm and two Linear; None if
    a user has put a norm or a Linear in the place of ours that has a bias more or less."""
    if in_proj['bias'] is not None or out_proj['bias'] is not None:
        return None
    pairs = [(module['weight'], module['bias']) for module in (norm1, out_norm, *of_mlp)]
    for weight, bias in pairs:
        if weight is None or bias is None:
            return None
    first, last, *pairs = pairs
    mlp = [t for pair in pairs for t in pair] if of_mlp else [None] * len(OF_MLP)
    return Weights(*first, in_proj['weight'], conv['weight'], ssm['x_proj_weight'],
                   ssm['dt_projs_weight'], ssm['dt_projs_bias'], ssm['A_logs'], ssm['Ds'], *last,
                   out_proj['weight'], *mlp, conv['bias'])


def _stage_weights_for_op(stage: 'VSSStage', x: Tensor, autocast: torch.dtype | None
                          ) -> list[Weights] | str:
    """The parameters of each block for the op ``vss_blocks``, or what keeps the stage from being
    that op."""
    if not runs_kernels(x):
        return _NOT_ON_GPU
    if torch.jit.is_tracing():  # which runs with and without gradients, and compares
        trains = wants_grad(x, *stage.parameters())
    else:
        trains = torch.is_grad_enabled()
    if trains:
        return 'gradients are wanted'
    if not is_plain(stage.blocks, nn.Sequential):
        return _NOT_PLAIN
    blocks, stage_weights, first_kind = list(stage.blocks), [], None
    for block in blocks:
        drop = block._modules.get('drop_path')
        if not are_plain((block, drop), (VSSBlock, DropPath)):
            return _NOT_PLAIN
        if drop.training and drop.drop_prob > 0:
            return 'a block drops paths'
        if block.feeds_matmul and block is not blocks[-1]:
            return 'the result of a block but the last is rounded'
        weights = _weights_for_op(block, x, autocast)
        if isinstance(weights, str):
            return weights
        kind = block.norm1.eps, *[None if t is None else t.dtype for t in weights]
        if kind != (first_kind := first_kind or kind):
            return 'blocks differ in eps, in the dtypes of parameters or in what has a bias'
        stage_weights.append(weights)
    return stage_weights


class VSSStage(Stage):
    """A :class:`Stage` of VSS blocks."""

    def _run_blocks(self, x: Tensor) -> Tensor:
        """``blocks(x)``, in inference on an NVIDIA GPU as one op."""
        autocast = autocast_dtype(x)
        weights = _stage_weights_for_op(self, x, autocast)
        if isinstance(weights, str):
            return self.blocks(x)
        out_dtype = autocast if self.blocks[-1].feeds_matmul else None
        return vss_blocks(x, weights, self.blocks[0].norm1.eps, autocast or x.dtype,
                          out_dtype or x.dtype)

    def why_not_one_op(self, x: Tensor) -> str | None:
        """The reason why the blocks do not run as one op on ``x``, but each by itself, or None.

        See :meth:`VSSBlock.why_not_one_op`.
        """
        weights = _stage_weights_for_op(self, x, autocast_dtype(x))
        return weights if isinstance(weights, str) else None
