"""ss2d_scan by the CUDA "walk" kernels: any number of states, fp16, bf16 and fp32 maps.

What they refuse: :func:`vmamba_mm.ops.walk.why_not`. Parameters are fp32, fp16 or bf16.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.ss2d_scan import layout
from vmamba_mm.ops.walk import Walk, states_shape, why_not

__all__ = ['backward', 'forward', 'states_shape', 'why_not']


def forward(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
            A: Tensor, D: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the inputs as in :func:`vmamba_mm.ops.ss2d_scan`; ``x`` with any strides.

    Returns:
        maps (K, B, H, W, D) in ``x``'s dtype, which add up to the result; projected
        (B*L, K*(R + 2N)): dt, B and C of each route; states: what enters each chunk, fp32 of
        :func:`states_shape`, empty unless ``save``.
    """
    routes, _, rank = dt_projs_weight.shape
    walk = Walk(x, routes, rank, (dt_projs_weight, dt_projs_bias, A, D), False)
    projected = layout.project(layout.pixels(x), x_proj_weight.flatten(0, 1).to(x.dtype))
    maps = walk.maps(x.dtype)
    states = walk.empty(*states_shape(walk.batch, routes, walk.length, walk.state, walk.dim)
                        ) if save else None
    walk.forward(projected, None, None, maps, states)
    return (walk.merge_groups(maps, x.dtype), projected,
            walk.empty(0) if states is None else states)


def backward(grad_maps: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
             dt_projs_bias: Tensor, A: Tensor, D: Tensor, projected: Tensor, states: Tensor):
    """Gradients by the six inputs of :func:`forward`, in their dtypes; by x with its strides.

    Args:
        grad_maps: (B, D, H, W), by the sum of the maps, in ``x``'s dtype; any strides.
        projected, states: what the forward gave with ``save``.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    routes, dim, rank = dt_projs_weight.shape
    walk = Walk(x, routes, rank, (dt_projs_weight, dt_projs_bias, A, D), False)
    maps = walk.maps(x.dtype)
    parts = None

    def outputs(columns: int):
        nonlocal parts
        count = columns * walk.groups
        parts = walk.empty(count, *projected.shape,
                           dtype=x.dtype if count == 1 else torch.float32)
        if walk.groups > 1:
            parts.zero_()  # a group has the columns of its own states alone
        return dict(grad_raw=parts)

    sums = walk.backward(projected, None, None, states, grad_maps, maps, outputs)
    grad_projected = parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
    weight = x_proj_weight.flatten(0, 1).to(x.dtype)
    total = maps.flatten(0, 1).sum(0, dtype=x.dtype)
    grad_x = torch.addmm(total.view(-1, dim), grad_projected, weight).view(total.shape).permute(
        0, 3, 1, 2)
    grad_weight = layout.project_weight_grad(grad_projected, layout.pixels(x))

    by_A, by_weight, by_bias, by_D = sums.split((walk.states, rank, 1, 1), dim=2)
    by_A = by_A.flatten(1, 2)[:, :walk.state].transpose(1, 2).reshape(A.shape)
    grads = (grad_weight.view(x_proj_weight.shape), by_weight.sum(1).transpose(1, 2),
             by_bias.sum(1).view(routes, dim), by_A, by_D[:, 0].reshape(-1))
    return layout.like(grad_x, x), *(g.to(t.dtype).contiguous()
                                     for g, t in zip(grads, parameters, strict=True))
