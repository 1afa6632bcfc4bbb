"""Convolutions and batch norms of maps with the channels last, (B, H, W, C)."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.plain import is_plain
from vmamba_mm.ops.core.backends import compute_dtype

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_evaluate_batch_norm')


def convolve_map(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of (B, H, W, C), whose result has the channels last in memory too."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def batch_norm_map(norm: nn.Module, x: Tensor) -> Tensor:
    """The batch norm of (B, H, W, C)."""
    if not norm.training and is_plain(norm, nn.BatchNorm2d) and norm.affine \
            and norm.track_running_stats:
        return _evaluate_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                    norm.eps)
    # The channels are last in memory whatever the convolution has done: of a map that is not, the
    # gradient by the norm of a single image is wrong on a CPU where the gradient that comes to it
    # has the channels last and a batch stride of its own (torch 2.14).
    return norm(x.contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _evaluate_batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
                         eps: float) -> Tensor:
    if x.is_cpu and x.dtype == weight.dtype == compute_dtype(x.dtype):
        # torch's own backward adds up all positions in fp32 one after the other where the channels
        # are last in memory; autograd's sums of these steps do it in a tree.
        return torch.addcmul(bias, x - mean, weight * torch.rsqrt(variance + eps))
    y = F.batch_norm(x.contiguous().permute(0, 3, 1, 2), mean, variance, weight, bias, eps=eps)
    return y.permute(0, 2, 3, 1)


class ConvUnit(nn.Module):
    """A convolution, a batch norm unless ``norm`` is False, and an activation, or none.

    Args:
        act: True for ``act_layer``, False for no activation.
        act_layer: its class.

    Shape: (B, H, W, C) -> (B, H', W', C').
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1,
                 padding: int = 0, groups: int = 1, bias: bool = True, norm: bool = True,
                 act: bool = True, act_layer: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim) if norm else None
        self.act = act_layer() if act else None

    def forward(self, x: Tensor) -> Tensor:
        y = convolve_map(self.conv, x)
        if self.norm is not None:
            y = batch_norm_map(self.norm, y)
        return y if self.act is None else self.act(y)
