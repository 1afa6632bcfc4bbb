"""Farthest point sampling as one Triton kernel, a program for each cloud, whose points stay in
registers: the loop in PyTorch is five launches for each point that is chosen."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def choose_points(points, chosen, count, num, near, BLOCK: tl.constexpr):
    """
    Args:
        points: (B, 3, N) in fp32, in the order in which equal distances count.
        chosen: (B, num), int64, places in this order.
        count, num: N, and how many are chosen.
        near: squared norm up to which a point is never chosen.
    """
    cloud = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    is_point = place < count
    first = points + cloud.to(tl.int64) * 3 * count
    x = tl.load(first + place, mask=is_point, other=0.0)
    y = tl.load(first + count + place, mask=is_point, other=0.0)
    z = tl.load(first + 2 * count + place, mask=is_point, other=0.0)
    nearest = tl.where(x * x + y * y + z * z > near, 1e10, -1.0)
    nearest = tl.where(is_point, nearest, -2.0)
    out = chosen + cloud.to(tl.int64) * num
    last = 0
    tl.store(out, last)
    for i in range(1, num):
        dx = x - tl.load(first + last)
        dy = y - tl.load(first + count + last)
        dz = z - tl.load(first + 2 * count + last)
        distance = dx * dx + dy * dy + dz * dz
        nearest = tl.minimum(nearest, distance)
        last = tl.argmax(nearest, 0)  # of equal ones the first
        tl.store(out + i, last)


def farthest_places(points: Tensor, num: int, near: float) -> Tensor:
    """The places (B, num), int64, of what is chosen of points (B, 3, N) in fp32, which
    fit into the registers of a program; see :func:`choose_points`."""
    batch, _, count = points.shape
    chosen = torch.empty(batch, num, dtype=torch.long, device=points.device)
    block = max(16, triton.next_power_of_2(count))
    # Without fused products, so that points equally far are so here too.
    choose_points[(batch,)](points, chosen, count, num, near, BLOCK=block, enable_fp_fusion=False,
                            num_warps=min(32, max(4, block // 256)))
    return chosen
