"""The middle of SS2D as published: four copies of the map and of dt, for comparison.

What benchmarks need of it: the error that plain PyTorch makes under autocast, and the memory that
the tensors take, in the dtypes of the public code (x, dt, B and C of all routes in half
precision, the routes' results in fp32).
"""

import torch
import torch.nn.functional as F

from vmamba_mm.ops import cross_merge, cross_scan, selective_scan

SLICE = 4  # images


class _SlicedScan(torch.autograd.Function):
    """``selective_scan`` by a few images at a time.

    What the scan itself needs for a while is then small beside its inputs and results: no more
    than these are held, as with a kernel that needs nothing.
    """

    @staticmethod
    def forward(ctx, backend, u, delta, A, B, C, D, bias):
        ctx.backend = backend
        ctx.save_for_backward(u, delta, A, B, C, D, bias)
        y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
        for i in range(0, len(u), SLICE):
            s = slice(i, i + SLICE)
            y[s] = _scan(backend, u[s], delta[s], A, B[s], C[s], D, bias)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        u, delta, A, B, C, D, bias = ctx.saved_tensors
        by_image = [torch.empty_like(t) for t in (u, delta, B, C)]
        summed = [torch.zeros_like(t) for t in (A, D, bias)]
        for i in range(0, len(u), SLICE):
            s = slice(i, i + SLICE)
            leaves = [t[s].detach().requires_grad_() for t in (u, delta, B, C)]
            parameters = [t.detach().requires_grad_() for t in (A, D, bias)]
            with torch.enable_grad():
                y = _scan(ctx.backend, leaves[0], leaves[1], parameters[0], leaves[2], leaves[3],
                          parameters[1], parameters[2])
            grads = torch.autograd.grad(y, leaves + parameters, grad_y[s])
            for total, grad in zip(by_image, grads[:4], strict=True):
                total[s] = grad
            for total, grad in zip(summed, grads[4:], strict=True):
                total += grad
        (grad_u, grad_delta, grad_B, grad_C), (grad_A, grad_D, grad_bias) = by_image, summed
        return None, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias


def _scan(backend, u, delta, A, B, C, D, bias):
    return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True,
                          out_dtype=torch.float32, backend=backend)


def ss2d_scan_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                   eps=1e-5, *, backend=None):
    """Shapes and result as of :func:`vmamba_mm.ops.ss2d_scan_norm`; ``backend`` of the scan."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    x_BKDL = cross_scan(x, len(x_proj_weight))
    projected = x_proj_weight.to(x.dtype) @ x_BKDL
    dt, B, C = projected.split((rank, state, state), dim=2)
    delta = dt_projs_weight.to(x.dtype) @ dt
    y = _SlicedScan.apply(backend, x_BKDL.flatten(1, 2), delta.flatten(1, 2), A, B.contiguous(),
                          C.contiguous(), D, dt_projs_bias.flatten())
    y_BDHW = cross_merge(y.view(x_BKDL.shape), *x.shape[2:])
    y = F.layer_norm(y_BDHW.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps)
    return y.to(x.dtype).permute(0, 3, 1, 2)
