"""``mamba_inner`` in plain PyTorch, forward and backward, for any device.

On a CPU a few samples go through everything before the next begin, so that what lies between the
ops stays in the cache and takes little memory. A direction that runs backwards reads the same
memory from the other end: nothing is flipped. Only inputs are kept for the backward.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.causal_conv import chunked as conv
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan import stepwise
from vmamba_mm.ops.selective_scan.activations import silu_backward, softplus


class _Direction:
    """One direction of some samples, up to its scan."""

    def __init__(self, way, x, parameters, k: int, backwards: bool):
        self.way, self.x, self.backwards = way, x, backwards
        self.conv_weight, conv_bias, self.x_proj, self.dt_proj, dt_bias, self.A, self.D = (
            None if t is None else t[k] for t in parameters)
        rank, state = self.dt_proj.shape[1], self.A.shape[1]
        self.convolved = conv.convolve(x, self.conv_weight, conv_bias, None, backwards)
        self.u = F.silu(self.convolved)
        self.dt, self.B, self.C = F.linear(self.u, self.x_proj).split((rank, state, state), dim=-1)
        self.raw_delta = F.linear(self.dt, self.dt_proj, dt_bias)
        self.delta = softplus(self.raw_delta)

    def scan(self, out: Tensor) -> None:
        """Add the result to ``out``."""
        out.addcmul_(self.u, self.D)
        self.way.scan(self.u, self.delta, self.A, self.B, self.C, self.backwards, out)

    def scan_backward(self, grad: Tensor, out: Tensor, grad_x: Tensor, grads) -> None:
        """As :meth:`scan`; and add to the gradients by x and the parameters, in their order."""
        grad_conv, grad_conv_bias, grad_x_proj, grad_dt_proj, grad_dt_bias, grad_A, grad_D = grads
        out.addcmul_(self.u, self.D)
        grad_u, grad_delta, by_A, grad_B, grad_C = self.way.scan_backward(
            grad, self.u, self.delta, self.A, self.B, self.C, self.backwards, out=out)
        grad_A += by_A
        grad_D += (grad * self.u).sum((0, 1))
        grad_u.addcmul_(grad, self.D)

        grad_delta.mul_(self.raw_delta.sigmoid_())
        grad_dt_bias += grad_delta.sum((0, 1))
        grad_projected = torch.cat((grad_delta @ self.dt_proj, grad_B, grad_C), dim=-1)
        rows, by_delta, by_row = (t.flatten(0, 1) for t in (self.u, grad_delta, grad_projected))
        grad_dt_proj.addmm_(by_delta.T, self.dt.flatten(0, 1))
        grad_x_proj.addmm_(by_row.T, rows)
        grad_u.flatten(0, 1).addmm_(by_row, self.x_proj)

        by_convolved = silu_backward(grad_u, self.convolved)
        conv.add_gradients(by_convolved, self.x, self.conv_weight, self.backwards, grad_x,
                           grad_conv)
        if grad_conv_bias is not None:
            grad_conv_bias += by_convolved.sum((0, 1))


def _start(way, xz, parameters, reverse):
    """Slices of the batch, the parameters in the compute dtype, and (k, backwards) in turn."""
    dtype, A = compute_dtype(xz.dtype), parameters[5]
    return (way.batch_blocks(len(xz), A[0].numel(), xz.device),
            [None if t is None else t.to(dtype) for t in parameters],
            [(0, reverse), (1, True)][:len(A)])


def forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale, *,
            way: ModuleType = stepwise) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.mamba_inner`; ``way`` has the scan and its backward."""
    parameters = conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
    samples, parameters, directions = _start(way, xz, parameters, reverse)
    out = xz.new_empty(*xz.shape[:2], D.shape[1])
    for some in samples:
        x, z = xz[some].to(parameters[0].dtype).contiguous().chunk(2, dim=-1)
        y = x.new_zeros(x.shape)
        for k, backwards in directions:
            _Direction(way, x, parameters, k, backwards).scan(y)
        out[some] = y.mul_(F.silu(z)).mul_(scale)
    return out


def backward(grad_y, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale, *,
             way: ModuleType = stepwise):
    """Gradients by xz and the parameters (None where there is none)."""
    given = conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
    samples, parameters, directions = _start(way, xz, given, reverse)
    dtype = parameters[0].dtype
    grad_xz = xz.new_empty(xz.shape)
    grads = [None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device)
             for t in parameters]
    for some in samples:
        x, z = xz[some].to(dtype).contiguous().chunk(2, dim=-1)
        grad = grad_y[some].to(dtype).contiguous() * scale
        gated = grad * F.silu(z)
        y, grad_x = torch.zeros_like(gated), torch.zeros_like(gated)
        for k, backwards in directions:
            _Direction(way, x, parameters, k, backwards).scan_backward(
                gated, y, grad_x, [None if t is None else t[k] for t in grads])
        grad_xz[some] = torch.cat((grad_x, silu_backward(grad.mul_(y), z)), dim=-1)
    return grad_xz, *(None if t is None else grad.to(t.dtype)
                      for grad, t in zip(grads, given, strict=True))
