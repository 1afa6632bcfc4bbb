"""Choosing points of clouds, and distances between clouds, in plain PyTorch on any device; on a
GPU farthest point sampling is a kernel of Triton where that runs.

Distances are sums of squared differences, in fp32 at least: the expanded square, as of
``torch.cdist``, cancels, and would choose other neighbours.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.scan_kernels import triton_backend

#: Squared distance from the origin up to which :func:`farthest_points` passes over a point.
NEAR_ORIGIN = 1e-3
#: Points of a cloud that the kernel of Triton takes.
MOST_OF_KERNEL = 16384


def farthest_points(points: Tensor, num: int) -> Tensor:
    """Farthest point sampling: each time the point that is farthest from all chosen so far.

    As ``furthest_point_sample`` of pointnet2_ops, which published models of points were trained
    with: the first point is number 0; points with a squared norm of at most 1e-3 are never chosen
    otherwise, as zeros there stand for padding; of equal distances the one with the smallest
    (k mod T) counts, then the smallest k, where T is the largest power of two of at most N and 512.
    Where no point is left, points come out again.

    Args:
        points: (B, N, 3), N at least 1; other columns after these three do not count.
        num: G, how many are chosen.

    Returns:
        Their numbers, (B, G), int64, without a gradient.
    """
    points = points.detach()[..., :3]
    return _farthest_points(points.to(compute_dtype(points.dtype)), num)


# One node of a graph that is compiled or exported, which its loop would fill. Numbers have no
# gradient, so that it needs nothing of define_op.
@torch.library.custom_op('vmamba_mm::farthest_points', mutates_args=())
def _farthest_points(points: Tensor, num: int) -> Tensor:
    count = points.shape[1]
    # In the order in which equal distances count, the first largest one is argmax's.
    threads = min(512, 1 << (count.bit_length() - 1))
    numbers = torch.arange(count, device=points.device)
    order = (numbers % threads * -(-count // threads) + numbers // threads).argsort()
    xyz = points[:, order].transpose(1, 2).contiguous()
    if count <= MOST_OF_KERNEL and triton_backend.why_not(xyz, xyz.dtype, True) is None:
        from vmamba_mm.ops.points.triton_sampling import farthest_places  # triton takes a second

        return order[farthest_places(xyz, num, NEAR_ORIGIN)]
    return order[_places_by_loop(xyz, num)]


def _places_by_loop(xyz: Tensor, num: int) -> Tensor:
    """The places (B, num) of what is chosen of points (B, 3, N), of equal distances the first."""
    nearest = torch.where(xyz.square().sum(1) > NEAR_ORIGIN, 1e10, -1.0).to(xyz.dtype)
    chosen = [torch.zeros(len(xyz), 1, dtype=torch.long, device=xyz.device)]
    for _ in range(num - 1):
        centre = xyz.gather(2, chosen[-1].unsqueeze(1).expand(-1, 3, 1))
        nearest = torch.minimum(nearest, (xyz - centre).square().sum(1))
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


@_farthest_points.register_fake
def _(points, num):
    return points.new_empty((points.shape[0], num), dtype=torch.long)


def nearest_points(points: Tensor, queries: Tensor, num: int) -> Tensor:
    """The nearest points of each query, the nearest first.

    Args:
        points: (B, N, 3).
        queries: (B, M, 3).
        num: K, at most N.

    Returns:
        Their numbers, (B, M, K), int64, without a gradient.

    Raises:
        ValueError: if there are fewer than ``num`` points.
    """
    if num > points.shape[1]:
        raise ValueError(f'there are {points.shape[1]} points, of which {num} cannot be nearest')
    distances = squared_distances(queries.detach(), points.detach())
    return distances.topk(num, dim=2, largest=False).indices


def group_points(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Centres by :func:`farthest_points`, and the nearest points of each, itself among them.

    Args:
        points: (B, N, 3).
        num_groups: G.
        group_size: S, at most N.

    Returns:
        The numbers of the centres, (B, G), and of their neighbours, (B, G, S).
    """
    centres = farthest_points(points, num_groups)
    return centres, nearest_points(points, take_points(points, centres), group_size)


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """(B, M, 3) and (B, N, 3) to (B, M, N), in fp32 at least; columns after the third do not
    count."""
    dtype = compute_dtype(first.dtype)
    total = None
    for axis in range(3):
        difference = first[:, :, None, axis].to(dtype) - second[:, None, :, axis].to(dtype)
        square = difference.square()
        total = square if total is None else total + square
    return total


def take_points(points: Tensor, indices: Tensor) -> Tensor:
    """Points, or what belongs to them, by number: (B, N, C) and (B, ...) to (B, ..., C)."""
    flat = indices.flatten(1)
    taken = points.gather(1, flat.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return taken.unflatten(1, indices.shape[1:])


def interpolate_points(features: Tensor, centres: Tensor, points: Tensor, num: int) -> Tensor:
    """Features at points, from those at the nearest centres (PointNet++, arXiv 1706.02413,
    section 3.4): their mean, weighted by the inverse of the squared distance.

    Args:
        features: (B, G, C).
        centres: (B, G, 3).
        points: (B, N, 3).
        num: centres that count for a point; of one alone its feature is taken.

    Returns:
        (B, N, C).
    """
    num = min(num, centres.shape[1])
    indices = nearest_points(centres, points, num)
    near = take_points(features, indices)
    if num == 1:
        return near.squeeze(2)
    difference = points.unsqueeze(2) - take_points(centres, indices)
    weights = 1 / (difference.to(compute_dtype(difference.dtype)).square().sum(-1) + 1e-8)
    weights = weights / weights.sum(2, keepdim=True)
    return (near * weights.unsqueeze(-1).to(near.dtype)).sum(2)


def chamfer_distance(first: Tensor, second: Tensor, kind: str = 'cdl2') -> Tensor:
    """The Chamfer distance of clouds, the mean over all of them.

    Args:
        first: (B, N, 3).
        second: (B, M, 3).
        kind: 'cdl2' for the mean squared distance to the nearest point of the other cloud, both
            ways added; 'cdl1' for half of the sum of the mean distances.

    Raises:
        ValueError: on another ``kind``.
    """
    if kind not in ('cdl1', 'cdl2'):
        raise ValueError(f"kind={kind!r} does not exist; choose 'cdl1' or 'cdl2'")
    distances = squared_distances(first, second)
    there, back = distances.min(2).values, distances.min(1).values
    if kind == 'cdl2':
        return there.mean() + back.mean()
    # The root has no gradient at 0.
    return sum(d.clamp_min(torch.finfo(d.dtype).tiny).sqrt().mean() for d in (there, back)) / 2
