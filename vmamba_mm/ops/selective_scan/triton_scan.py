"""The selective scan by Triton, the portable GPU path; the kernels' module says how they work."""

from math import e, log2

import torch
from torch import Tensor

from vmamba_mm.ops.scan_kernels import triton_backend
from vmamba_mm.ops.scan_kernels.triton_backend import load_launches


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor | None, ...],
            by_default: bool = False) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return triton_backend.why_not(x, out_dtype, by_default)


class _Problem:
    """Sizes and fp32 parameters of a scan, the blocks of the batch, and the launch of a block."""

    def __init__(self, u, A, B, D, delta_bias, delta_softplus, backward: bool):
        triton_launch = load_launches()
        batch, channels, self.length = u.shape
        self.groups, self.state = B.shape[1:3]
        self.dim = channels // self.groups
        self.softplus = delta_softplus
        self.tile = triton_backend.tile_length(triton_launch.interpreted(), backward)
        shape = (self.groups, self.dim)
        self.A = A.float().view(*shape, self.state).transpose(1, 2).contiguous() * log2(e)
        self.bias = A.new_zeros(shape, dtype=torch.float32)
        if delta_bias is not None:
            self.bias += delta_bias.view(shape)
        self.weight = A.new_empty((self.groups, 0, self.dim), dtype=torch.float32)
        self.skip = None if D is None else D.float().view(shape).contiguous()
        self.parts = -(-self.dim // triton_launch.channel_block(self.dim)[0]) if backward else 0
        each = 8 * self.groups * self.length * self.state * self.parts
        each += triton_backend.carry_bytes(self.length, self.tile, self.groups, self.dim,
                                           self.state, backward)
        self.blocks = triton_backend.blocks(batch, each)

    @staticmethod
    def strides(sequence: Tensor) -> tuple[int, ...]:
        """Strides of samples, lines (there is one), steps and channels."""
        b, d, step = sequence.stride()
        return b, 0, step, d

    def axis_scan(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor):
        batch, groups, _, length = B.shape
        return load_launches().AxisScan(
            u=u, u_strides=self.strides(u), delta=delta, delta_strides=self.strides(delta),
            B=B.contiguous(), C=C.contiguous(), A=self.A, weight=self.weight, bias=self.bias,
            skip=self.skip, batch=batch, groups=groups, length=length, line_length=length,
            first_route=0, directions=1, project=False, softplus=self.softplus)


def forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.selective_scan`."""
    triton_launch = load_launches()
    out = torch.empty(u.shape, dtype=out_dtype, device=u.device)
    problem = _Problem(u, A, B, D, delta_bias, delta_softplus, backward=False)
    with triton_launch.on_device(u):
        for block in problem.blocks:
            scan = problem.axis_scan(u[block], delta[block], B[block], C[block])
            carries = triton_launch.Carries(scan, problem.tile, with_grad=False)
            carries.summarise(scan)
            carries.chain(scan, with_grad=False)
            triton_launch.scan_forward(scan, carries, out[block], problem.strides(out), None)
    return out


def backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients by u, delta, A, B, C, D, delta_bias (None where the input is None)."""
    triton_launch = load_launches()
    problem = _Problem(u, A, B, D, delta_bias, delta_softplus, backward=True)
    state = problem.state
    grad_u, grad_delta, grad_B, grad_C = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta, B, C))
    sums = torch.zeros(problem.groups, state + 2, problem.dim, device=u.device)
    with triton_launch.on_device(u):
        for block in problem.blocks:
            scan = problem.axis_scan(u[block], delta[block], B[block], C[block])
            grad = grad_y[block]
            carries = triton_launch.Carries(scan, problem.tile, with_grad=True)
            carries.summarise(scan, grad, problem.strides(grad))
            carries.chain(scan, with_grad=True)
            parts = torch.empty(2, problem.parts, *scan.B.shape, dtype=torch.float32,
                                device=u.device)
            block_sums = triton_launch.scan_backward(
                scan, carries, grad, problem.strides(grad), grad_u[block], grad_delta[block],
                problem.strides(grad_u), False, parts)
            # Nobody writes the last row if there is no skip.
            rows = state + 1 + (D is not None)
            sums[:, :rows] += block_sums[:, :rows]
            grad_B[block], grad_C[block] = parts.sum(1)
    grad_A, grad_bias, grad_D = sums.split((state, 1, 1), dim=1)
    # Copies without gaps, for torch.library wants results that share no memory.
    def copy(grad, like):
        return grad.to(like.dtype, copy=True, memory_format=torch.contiguous_format)

    grad_A = copy(grad_A.transpose(1, 2).flatten(0, 1), A)
    grad_bias, grad_D = (
        None if t is None else copy(g.flatten(), t)
        for g, t in ((grad_bias, delta_bias), (grad_D, D)))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias
