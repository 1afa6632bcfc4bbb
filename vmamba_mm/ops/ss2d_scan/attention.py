"""What SS2D's scan reads from where: S6 written as masked attention, for one query pixel.

Unrolled along a route from a state of 0, S6 at step t is, for each channel d (state n, step i),

    y_t = sum_(i <= t) a_ti v_i + D u_t            v_i = delta_i u_i
    a_ti = sum_n C_tn exp(A_n (delta_(i+1) + ... + delta_t)) B_in

which is attention with Q = C, K = B, V = delta u: if w_i = exp(A (delta_1 + ... + delta_i)), a is
(Q * w) (K / w)^T up to the diagonal, the activation maps of the paper (arXiv 2401.10166, on the
relationship between SS2D and self-attention). Here the decay between two steps is computed as such:
on long routes w itself underflows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.orders.reference import scan_forward
from vmamba_mm.ops.ss2d_scan.op import check
from vmamba_mm.ops.ss2d_scan.reference import project


class ScanAttention(NamedTuple):
    """The attention of one query pixel, each number at the place of the pixel that is read.

    0 in ``weights`` and ``qk`` where a route has not been before the query. A route's output is
    ``(weights * values).sum((-2, -1))`` and the skip, D u_t.
    """

    weights: Tensor  #: (B, K, D, H, W), a_ti: the weight of v_i
    values: Tensor  #: (B, K, D, H, W), v_i
    qk: Tensor  #: (B, K, H, W), C_t B_i^T: the weight without the decay, the same for each channel
    seen: Tensor  #: (K, H, W) bool, the pixels up to the query on each route, itself included


def ss2d_attention(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
                   dt_projs_bias: Tensor, A: Tensor, D: Tensor, pixel: tuple[int, int]
                   ) -> ScanAttention:
    """The attention by which ``ss2d_scan`` makes its output at one pixel from all others.

    In plain PyTorch on any device, differentiable, O(H W) as the scan itself. The sum over routes,
    pixels and skips is the op's output at ``pixel``.

    Args:
        x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D: as in ``ss2d_scan``; fp64 computes
            in fp64, all else in fp32.
        pixel: (row, column) of the query in the map.

    Returns:
        A :class:`ScanAttention`, fp64 or fp32.

    Raises:
        ValueError: on shapes that do not fit one another, or a pixel outside the map.
    """
    check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    height, width = x.shape[2:]
    row, column = pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f'pixel must be (row, column) in a map of {height}x{width}, got {pixel}')
    dtype = compute_dtype(x.dtype)
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A = (
        t.to(dtype) for t in (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A))
    num_routes = x_proj_weight.shape[0]
    u_BKDL, _, delta, B_BKNL, C_BKNL = project(x, x_proj_weight, dt_projs_weight, A, num_routes)
    delta = F.softplus(delta + dt_projs_bias[..., None])
    pixels = torch.arange(height * width, device=x.device).view(1, 1, height, width)
    order_KL = scan_forward(pixels, num_routes)[0, :, 0]  # the pixel at each step

    maps = []
    for k, A_DN in enumerate(A.unflatten(0, (num_routes, -1))):
        step = (order_KL[k] == row * width + column).nonzero().item()
        until = slice(step + 1)
        between = delta[:, k, :, 1:step + 1].flip(-1).cumsum(-1).flip(-1)
        between_BDL = F.pad(between, (0, 1))  # delta_(i+1) + ... + delta_t, 0 for t itself
        products_BNL = C_BKNL[:, k, :, step, None] * B_BKNL[:, k, :, until]
        weights = torch.zeros_like(between_BDL)
        for n in range(A.shape[1]):  # nothing of size L*D*N ever exists
            weights = weights + products_BNL[:, n, None] * torch.exp(A_DN[:, n, None] * between_BDL)
        seen = torch.ones_like(order_KL[k, until], dtype=torch.bool)
        sequences = (weights, (delta * u_BKDL)[:, k], products_BNL.sum(1), seen)
        maps.append([_to_map(s, order_KL[k], height, width) for s in sequences])
    weights, values, qk, seen = zip(*maps, strict=True)
    return ScanAttention(torch.stack(weights, 1), torch.stack(values, 1), torch.stack(qk, 1),
                         torch.stack(seen))


def _to_map(sequence: Tensor, order: Tensor, height: int, width: int) -> Tensor:
    """(..., T) of the first T steps of a route -> (..., H, W), 0 at the others."""
    flat = sequence.new_zeros(*sequence.shape[:-1], height * width)
    flat = flat.index_copy(-1, order[:sequence.shape[-1]], sequence)
    return flat.unflatten(-1, (height, width))
