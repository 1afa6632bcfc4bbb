"""Convolutions and batch norms of maps with the channels last, (B, H, W, C)."""

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.plain import is_depthwise_3x3, is_plain, is_pointwise
from vmamba_mm.ops import add_norm, dwconv_add, evaluate_batch_norm, linear_relu
from vmamba_mm.ops.core.backends import runs_kernels

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('add_norm')
torch.fx.wrap('dwconv_add')
torch.fx.wrap('evaluate_batch_norm')
torch.fx.wrap('linear_relu')


def convolve_map(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of (B, H, W, C), whose result has the channels last in memory too."""
    if runs_kernels(x) and is_pointwise(conv):  # which adds the bias in the product
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def add_convolution(conv: nn.Module, x: Tensor, branch: Tensor | None = None,
                    scale: Tensor | None = None) -> Tensor:
    """``t + conv(t)`` of ``t = x + scale * branch``: (B, H, W, C) -> (B, H, W, C); of a depthwise
    3x3 convolution one kernel on an NVIDIA GPU.

    Args:
        conv: a convolution that keeps the size of a map.
        x, branch: (B, H, W, C); None for no branch.
        scale: (B), or None for 1.
    """
    if is_depthwise_3x3(conv):
        return dwconv_add(x, conv.weight, conv.bias, branch, scale=scale)
    if branch is not None:
        x, _ = add_norm(x, branch, None, None, scale=scale)
    return add_norm(x, convolve_map(conv, x), None, None)[0]


def batch_norm_map(norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: bool = False
                   ) -> Tensor:
    """The batch norm of (B, H, W, C), plus ``residual``, and ReLU of it if ``relu``."""
    if not norm.training and is_plain(norm, nn.BatchNorm2d) and norm.affine \
            and norm.track_running_stats:
        return evaluate_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                   norm.eps, residual=residual, relu=relu)
    # The channels are last in memory whatever the convolution has done: of a map that is not, the
    # gradient by the norm of a single image is wrong on a CPU where the gradient that comes to it
    # has the channels last and a batch stride of its own (torch 2.14).
    y = norm(x.contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if residual is not None:
        y = residual + y
    return F.relu(y) if relu else y


class ConvUnit(nn.Module):
    """A convolution, a batch norm unless ``norm`` is False, and an activation, or none.

    Args:
        act: True for ``act_layer``, False for no activation.
        act_layer: its class.

    Shape: (B, H, W, C), and for the result a residual that is added before the activation, or
    none -> (B, H', W', C').
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1,
                 padding: int = 0, groups: int = 1, bias: bool = True, norm: bool = True,
                 act: bool = True, act_layer: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim) if norm else None
        self.act = act_layer() if act else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, norm, act = self.conv, self.norm, self.act
        relu = is_plain(act, nn.ReLU)  # then it goes into what comes before
        if relu and norm is None and residual is None and runs_kernels(x) and is_pointwise(conv) \
                and conv.bias is not None:
            return linear_relu(x, conv.weight.flatten(1), conv.bias)
        y = convolve_map(conv, x)
        if norm is not None:
            y = batch_norm_map(norm, y, residual, relu)
            return y if relu or act is None else act(y)
        if residual is not None:
            y = residual + y
        return y if act is None else act(y)
