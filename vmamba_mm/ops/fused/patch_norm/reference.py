"""``expand_norm`` and ``merge_norm`` in plain PyTorch: their specification, and what runs where no
kernel does."""

import torch
from torch import Tensor

from vmamba_mm.ops.fused.add_norm.reference import layer_norm


def expand(x: Tensor, factor: int) -> Tensor:
    """(B, H, W, f * f * C) -> (B, f * H, f * W, C)."""
    x = x.unflatten(3, (factor, factor, -1))  # (B, H, W, f, f, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H // 2, W // 2, 4 * C): x00, x10, x01, x11."""
    height, width = x.shape[1:3]
    x = x[:, :height // 2 * 2, :width // 2 * 2]
    corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
    return torch.cat(corners, dim=-1)


def expand_norm(x, weight, bias, factor, eps, out_dtype) -> Tensor:
    return layer_norm(expand(x, factor), weight, bias, eps).to(out_dtype)


def merge_norm(x, weight, bias, eps, out_dtype) -> Tensor:
    return layer_norm(merge(x), weight, bias, eps).to(out_dtype)
