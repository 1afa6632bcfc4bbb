"""The middle of SS2D by Triton, the portable GPU path; the kernels' module says how they work.

The projections are pointwise: one matrix product for all routes, in fp32 whatever the map's
dtype. Rows and columns are two scans of the same memory. Large batches go in blocks.
"""

from math import e, log2

import torch
from torch import Tensor

from vmamba_mm.ops.scan_kernels import triton_backend
from vmamba_mm.ops.scan_kernels.triton_backend import load_launches

LOG2_E = log2(e)


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor, ...],
            by_default: bool = False) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return triton_backend.why_not(x, out_dtype, by_default)


class _Problem:
    """Sizes and fp32 parameters of a scan, the blocks of the batch; for a block, the projections
    and the launches along both axes."""

    def __init__(self, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, backward: bool):
        triton_launch = load_launches()
        self.routes, self.dim, self.rank = dt_projs_weight.shape
        self.state = A.shape[1]
        self.row = self.rank + 2 * self.state
        self.height, self.width = x.shape[2:]
        self.length = self.height * self.width
        self.tile = triton_backend.tile_length(triton_launch.interpreted(), backward)
        self.x_weight = x_proj_weight.float().flatten(0, 1)
        self.dt_weight = dt_projs_weight.float().transpose(1, 2).contiguous()
        self.bias = dt_projs_bias.float().contiguous()
        self.A = A.float().view(self.routes, self.dim, self.state).transpose(1, 2) * LOG2_E
        self.A = self.A.contiguous()
        self.skip = D.float().view(self.routes, self.dim).sum(0)
        self.axes = min(2, self.routes)
        # Columns first in memory: positions are numbered as they lie there.
        self.turned = self.height > 1 < self.width and x.stride(2) < x.stride(3)
        self.parts = -(-self.dim // triton_launch.channel_block(self.dim)[0]) if backward else 0
        each = self.length * (8 * self.dim + 4 * self.routes * self.row * (1 + self.parts))
        each += triton_backend.carry_bytes(self.length, self.tile, self.routes, self.dim,
                                           self.state, backward)
        self.blocks = triton_backend.blocks(len(x), each)

    def flat(self, x_BDHW: Tensor) -> Tensor:
        """(B, L, D), positions in the order in which they lie in memory."""
        order = (0, 3, 2, 1) if self.turned else (0, 2, 3, 1)
        return x_BDHW.permute(*order).flatten(1, 2)

    def map(self, x_BLD: Tensor) -> Tensor:
        """The inverse of :meth:`flat`."""
        if self.turned:
            return x_BLD.unflatten(1, (self.width, self.height)).permute(0, 3, 2, 1)
        return x_BLD.unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)

    def project(self, x_BLD: Tensor) -> Tensor:
        """(B, L, K (R + 2N)) in fp32, without a copy of a channels-first map."""
        if x_BLD.is_contiguous():
            return torch.mm(x_BLD.flatten(0, 1), self.x_weight.T).view(*x_BLD.shape[:2], -1)
        return torch.bmm(x_BLD, self.x_weight.T.expand(len(x_BLD), -1, -1))

    @staticmethod
    def strides(map_BDHW: Tensor, axis: int) -> tuple[int, ...]:
        """Strides of samples, lines, steps and channels, along rows (axis 0) or columns."""
        b, d, h, w = map_BDHW.stride()
        return (b, h, w, d) if axis == 0 else (b, w, h, d)

    def axis_scans(self, x: Tensor, projected: Tensor, written: tuple[Tensor, ...]):
        """(axis, its launch) for rows and columns; ``written`` are the maps read and written beside
        x."""
        maps = (x, self.map(projected), *written)
        for axis in range(self.axes):
            strides = [self.strides(tensor, axis) for tensor in maps]
            line_length = self.height if axis else self.width
            if all(line == step * line_length for _, line, step, _ in strides):
                line_length = self.length  # lines follow one another: as if it were one
            yield axis, load_launches().AxisScan(
                u=x, u_strides=strides[0], delta=projected, delta_strides=(*strides[1][:3], 1),
                B=projected, C=projected, A=self.A, weight=self.dt_weight, bias=self.bias,
                skip=None if axis else self.skip, batch=len(x), groups=1, length=self.length,
                line_length=line_length, first_route=axis,
                directions=1 if self.routes < 4 else 2, project=True, softplus=True)


def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.ss2d_scan`."""
    triton_launch = load_launches()
    out = torch.empty_like(x, dtype=out_dtype)
    problem = _Problem(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, backward=False)
    with triton_launch.on_device(x):
        for block in problem.blocks:
            x_block, y = x[block], out[block]
            projected = problem.project(problem.flat(x_block).float())
            scans = list(problem.axis_scans(x_block, projected, (y,)))
            carries = triton_launch.Carries(scans[0][1], problem.tile, with_grad=False)
            for _, scan in scans:
                carries.summarise(scan)
            carries.chain(scans[0][1], with_grad=False)
            # The rows' result is rounded once, after the columns' has been added.
            rows = y
            if problem.axes == 2 and out_dtype != torch.float32:
                rows = torch.empty_strided(y.shape, y.stride(), dtype=torch.float32,
                                           device=y.device)
            for axis, scan in scans:
                target = y if axis == problem.axes - 1 else rows
                triton_launch.scan_forward(scan, carries, target, problem.strides(y, axis),
                                           rows if axis else None)
    return out


def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D):
    """Gradients by x, the two projections, the dt bias, A and D; only inputs were saved."""
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    triton_launch = load_launches()
    problem = _Problem(*inputs, backward=True)
    rank, state = problem.rank, problem.state
    grad_x = torch.empty_like(x)
    grad_x_weight = torch.zeros_like(problem.x_weight)
    sums = grad_x_weight.new_zeros(problem.routes, rank + state + 1, problem.dim)
    grad_skip = torch.zeros_like(problem.skip)
    with triton_launch.on_device(x):
        for block in problem.blocks:
            x_block, grad = x[block], grad_y[block]
            x_BLD = problem.flat(x_block).float()
            projected = problem.project(x_BLD)
            grad_BLD = torch.empty(x_BLD.shape, dtype=torch.float32, device=x.device)
            grad_map = problem.map(grad_BLD)
            parts = torch.empty(problem.parts, *projected.shape, dtype=torch.float32,
                                device=x.device)
            scans = list(problem.axis_scans(x_block, projected, (grad, grad_map)))
            carries = triton_launch.Carries(scans[0][1], problem.tile, with_grad=True)
            for axis, scan in scans:
                carries.summarise(scan, grad, problem.strides(grad, axis))
            carries.chain(scans[0][1], with_grad=True)
            for axis, scan in scans:
                axis_sums = triton_launch.scan_backward(
                    scan, carries, grad, problem.strides(grad, axis), grad_BLD, None,
                    problem.strides(grad_map, axis), axis > 0, parts)
                routes = slice(axis, None, 2)
                sums[routes] += axis_sums[routes, :-1]
                if axis == 0:
                    grad_skip += axis_sums[0, -1]
            grad_projected = parts[0] if problem.parts == 1 else parts.sum(0)
            del parts
            rows = grad_projected.flatten(0, 1)
            if x_BLD.is_contiguous():
                grad_x_weight.addmm_(rows.T, x_BLD.flatten(0, 1))
            else:
                grad_x_weight += torch.bmm(grad_projected.transpose(1, 2), x_BLD).sum(0)
            grad_BLD.flatten(0, 1).addmm_(rows, problem.x_weight)
            grad_x[block] = grad_map
    grad_dt_weight, grad_A, grad_bias = sums.split((rank, state, 1), dim=1)
    grads = (grad_x_weight.view_as(x_proj_weight), grad_dt_weight.transpose(1, 2),
             grad_bias[:, 0], grad_A.transpose(1, 2).flatten(0, 1),
             grad_skip.repeat(problem.routes))
    # Copies without gaps, for torch.library wants results that share no memory.
    return grad_x, *(g.to(t.dtype, copy=True, memory_format=torch.contiguous_format)
                     for g, t in zip(grads, inputs[1:], strict=True))
