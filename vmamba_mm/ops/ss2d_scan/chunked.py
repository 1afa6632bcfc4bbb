"""The middle of SS2D without four copies of the map, in plain PyTorch: exact, for any device.

The projections are pointwise, so they commute with the scan order. The map is copied once for the
rows and once for the columns, time first; each copy is scanned from both ends. Where H and W are
of one order, a chunk is a row (or column) and the copy is the map itself, transposed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan import chunks
from vmamba_mm.ops.selective_scan.activations import softplus
from vmamba_mm.ops.selective_scan.chunks import chunk_sequence, to_chunks

#: Elements of one (T, G, M, D) tensor: about eight of them are in use at a time, and should stay
#: in the last-level cache of a CPU.
_BLOCK = 1 << 20


def _oriented(x_BDHW: Tensor, column: bool) -> Tensor:
    """(M, D, H, W) -> (M, G, T, D) in row-major or column-major order; a view where it can be."""
    x = x_BDHW.permute(0, 3, 2, 1) if column else x_BDHW.permute(0, 2, 3, 1)
    short, long = sorted(x.shape[1:3])
    return x if long <= 16 * short else chunk_sequence(x.flatten(1, 2))


def _add_to_map(out_BDHW: Tensor, y_TGBD: Tensor, column: bool) -> None:
    """Add time-first chunks back into place."""
    y_BGTD = y_TGBD.permute(2, 1, 0, 3)
    target = out_BDHW.permute(0, 3, 2, 1) if column else out_BDHW.permute(0, 2, 3, 1)
    if y_BGTD.shape[1:3] != target.shape[1:3]:
        length = target.shape[1] * target.shape[2]
        y_BGTD = y_BGTD.flatten(1, 2)[:, :length].unflatten(1, target.shape[1:3])
    target.add_(y_BGTD)


def _blocks(x: Tensor):
    """Slices of the batch that keep the working set in cache on a CPU; the batch elsewhere."""
    batch = x.shape[0]
    size = max(1, batch if x.is_cuda else _BLOCK // max(1, x.shape[1:].numel()))
    return (slice(i, i + size) for i in range(0, batch, size))


def _project(u_TGBD: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, bias: Tensor):
    """Each route's dt (rank R), delta before softplus, B and C, all (T, G, M, ...).

    The routes that share an order share one matrix product.
    """
    rank = dt_projs_weight.shape[2]
    state = (x_proj_weight.shape[1] - rank) // 2
    projected = F.linear(u_TGBD, x_proj_weight.flatten(0, 1)).chunk(len(x_proj_weight), dim=-1)
    for k, route in enumerate(projected):
        dt, B, C = route.split((rank, state, state), dim=-1)
        yield dt, F.linear(dt, dt_projs_weight[k], bias[k]), B, C


def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.ss2d_scan`."""
    dtype = compute_dtype(x.dtype)
    out = torch.empty_like(x, dtype=out_dtype)
    num_routes, _, dim = x_proj_weight.shape
    x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (
        t.to(dtype) for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D))
    A = A.view(num_routes, dim, -1)
    skip = D.view(num_routes, dim, 1, 1).sum(0)
    for block in _blocks(x):
        x_block = x[block]
        merged = x_block.to(dtype) * skip
        for column in range(min(2, num_routes)):
            u = to_chunks(_oriented(x_block, column), dtype)
            y = torch.zeros_like(u)
            routes = slice(column, None, 2)
            projected = _project(u, x_proj_weight[routes], dt_projs_weight[routes],
                                 dt_projs_bias[routes])
            for k, (_, raw_delta, B, C) in zip((column, column + 2), projected, strict=False):
                chunks.scan(u, softplus(raw_delta), A[k], B, C, reverse=k >= 2, out=y)
            _add_to_map(merged, y, column)
        out[block] = merged
    return out


def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D):
    """Gradients by x, the two projections, the dt bias, A and D; only inputs were saved."""
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    dtype = compute_dtype(x.dtype)
    grad_x = torch.empty_like(x)
    num_routes, _, dim = x_proj_weight.shape
    x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (t.to(dtype) for t in inputs[1:])
    A = A.view(num_routes, dim, -1)
    skip = D.view(num_routes, dim, 1, 1).sum(0)
    grads = [torch.zeros_like(t) for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A)]
    grad_x_weight, grad_dt_weight, grad_bias, grad_A = grads
    grad_skip = torch.zeros_like(D[:dim])
    for block in _blocks(x):
        x_block, grad_block = x[block], grad_y[block].to(dtype)
        grad_map = grad_block * skip
        grad_skip += (grad_block * x_block).sum((0, 2, 3))
        for column in range(min(2, num_routes)):
            u = to_chunks(_oriented(x_block, column), dtype)
            gy = to_chunks(_oriented(grad_block, column), dtype)
            gu = torch.zeros_like(u)
            routes = slice(column, None, 2)
            projected = _project(u, x_proj_weight[routes], dt_projs_weight[routes],
                                 dt_projs_bias[routes])
            for k, (dt, raw_delta, B, C) in zip((column, column + 2), projected, strict=False):
                gu_k, gdelta, gA, gB, gC = chunks.scan_backward(
                    gy, u, softplus(raw_delta), A[k], B, C, reverse=k >= 2)
                gdelta.mul_(raw_delta.sigmoid_())
                gdelta_2d = gdelta.flatten(0, 2)
                grad_A[k] += gA
                grad_bias[k] += gdelta_2d.sum(0)
                grad_dt_weight[k] += gdelta_2d.T @ dt.flatten(0, 2)
                gprojected = torch.cat((gdelta @ dt_projs_weight[k], gB, gC), dim=-1)
                grad_x_weight[k] += gprojected.flatten(0, 2).T @ u.flatten(0, 2)
                gu += gu_k
                gu += gprojected @ x_proj_weight[k]
            _add_to_map(grad_map, gu, column)
        grad_x[block] = grad_map
    grad_D = grad_skip.repeat(num_routes)
    grads = (grad_x, grad_x_weight, grad_dt_weight, grad_bias, grad_A.flatten(0, 1), grad_D)
    return grad_x, *(g.to(t.dtype).contiguous() for g, t in zip(grads[1:], inputs[1:], strict=True))
