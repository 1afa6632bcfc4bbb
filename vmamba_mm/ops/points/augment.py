"""Random changes of clouds, (B, N, C) with x, y and z first, each cloud another one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _uniform(points: Tensor, low: float, high: float, size: int) -> Tensor:
    """(B, 1, size), uniform."""
    return torch.rand(len(points), 1, size, device=points.device, dtype=points.dtype) \
        * (high - low) + low


def _with_xyz(points: Tensor, xyz: Tensor) -> Tensor:
    return xyz if points.shape[-1] == 3 else torch.cat([xyz, points[..., 3:]], -1)


def scale_and_shift(points: Tensor, scale: Sequence[float] = (2 / 3, 3 / 2), shift: float = 0.2,
                    per_axis: bool = True) -> Tensor:
    """Scale by a factor from ``scale``, for each axis another one or of all the same, and shift
    each axis by up to ``shift``."""
    factor = _uniform(points, *scale, 3 if per_axis else 1)
    return _with_xyz(points, points[..., :3] * factor + _uniform(points, -shift, shift, 3))


def rotate(points: Tensor, axis: str = 'y') -> Tensor:
    """Turn about the axis 'x', 'y' or 'z' by any angle."""
    along = 'xyz'.index(axis)
    first, second = (i for i in range(3) if i != along)
    angle = _uniform(points, 0, 2 * math.pi, 1)[..., 0]
    cos, sin = angle.cos(), angle.sin()
    columns = list(points[..., :3].unbind(-1))
    columns[first], columns[second] = (cos * columns[first] - sin * columns[second],
                                       sin * columns[first] + cos * columns[second])
    return _with_xyz(points, torch.stack(columns, -1))


def jitter(points: Tensor, std: float = 0.01, clip: float = 0.05) -> Tensor:
    """Move each point by normal noise, at most by ``clip`` along an axis."""
    noise = torch.randn_like(points[..., :3]).mul(std).clamp(-clip, clip)
    return _with_xyz(points, points[..., :3] + noise)


AUGMENTS = dict(scale_shift=scale_and_shift, rotate=rotate, jitter=jitter)
