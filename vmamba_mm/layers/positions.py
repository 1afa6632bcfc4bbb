"""Position embeddings, brought to the sizes of an input."""

import math

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.ops.core.backends import compute_dtype


def pad_to_a_patch(x: Tensor, patch_size: int) -> Tensor:
    """(..., H, W); sides that are smaller than a patch get zeros below, or on the right."""
    height, width = x.shape[-2:]
    if height >= patch_size and width >= patch_size:
        return x
    return F.pad(x, (0, max(0, patch_size - width), 0, max(0, patch_size - height)))


def pad_to_strides(x: Tensor, patch_size: int, stride: int) -> Tensor:
    """(..., H, W) with zeros below and on the right, so that the patches that begin at every
    ``stride`` pixels are all there."""
    down, right = (max(0, (-(-side // stride) - 1) * stride + patch_size - side)
                   for side in x.shape[-2:])
    return F.pad(x, (0, right, 0, down)) if down or right else x


def pad_to_patches(x: Tensor, patch_size: int) -> Tensor:
    """(..., H, W) with zeros below and on the right up to multiples of ``patch_size``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % patch_size, 0, -height % patch_size))


def pad_volume(x: Tensor, stride: int) -> Tensor:
    """(B, C, D, H, W) with zeros at the end of each axis up to multiples of ``stride``.

    Raises:
        ValueError: if the volume is none, or no larger than ``stride`` along every axis.
    """
    if x.dim() != 5:
        raise ValueError(f'the model takes volumes (B, C, D, H, W), got {tuple(x.shape)}')
    if max(x.shape[2:]) <= stride:
        raise ValueError(f'a volume of {"x".join(map(str, x.shape[2:]))} voxels is too small: the '
                         f'model needs more than {stride} along at least one axis; pad it')
    pads = [n for side in reversed(x.shape[2:]) for n in (0, -side % stride)]
    return F.pad(x, pads) if any(pads) else x


def resize_grid(embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, h * w, C) of the grid ``old``, bicubic, for the grid ``new``."""
    if old == new:
        return embed
    grid = embed.transpose(1, 2).unflatten(2, old)
    # In fp32 at least: halves would round the weights of the neighbours.
    grid = F.interpolate(grid.to(compute_dtype(embed.dtype)), new, mode='bicubic',
                         align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(embed.dtype)


def resize_patches(embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, n, C) of a checkpoint, for ``grid``: as it is if that has n patches, else of a square.

    Raises:
        UserError: if n is neither the grid's number nor that of a square.
    """
    count = embed.shape[1]
    if count == grid[0] * grid[1]:
        return embed
    side = math.isqrt(count)
    if side ** 2 != count:
        raise UserError(f'a position embedding of {count} patches, which are no square, cannot be '
                        f'resized to {grid[0]}x{grid[1]}')
    return resize_grid(embed, (side, side), grid)


def resize_time(embed: Tensor, frames: int) -> Tensor:
    """(T, 1, C), linear, for another number of frames."""
    if embed.shape[0] == frames:
        return embed
    line = F.interpolate(embed.permute(1, 2, 0).to(compute_dtype(embed.dtype)), frames,
                         mode='linear', align_corners=False)
    return line.permute(2, 0, 1).to(embed.dtype)
