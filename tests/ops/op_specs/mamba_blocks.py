from functools import partial

import torch
import torch.nn.functional as F

from op_specs import Spec, randn
from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.mamba_blocks import (
    Direction,
    Weights,
    flatten,
    mamba_block,
    mamba_blocks,
    reference,
)
from vmamba_mm.ops.mamba_blocks.op import spread
from vmamba_mm.testing import mamba_inner_inputs

EPS = 1e-5


def make(batch, length, dim, inner, routes, blocks=2, norm='rms'):
    """Blocks with R = 4, N = 16 and 4 taps; ``norm`` is 'rms' or 'ln'."""
    inputs = dict(hidden=randn(batch, length, dim), residual=randn(batch, length, dim, seed=1))
    for i in range(blocks):
        given = mamba_inner_inputs(1, routes, inner, 1, 16, 4, dtype=torch.float64, seed=i)
        weights = Weights(
            randn(dim, seed=2 + i) / 2 + 1,
            randn(dim, seed=7 + i) / 2 if norm == 'ln' else None,
            randn(2 * inner, dim, seed=3 + i) / dim**0.5,
            randn(dim, inner, seed=4 + i) / inner**0.5, tuple(Direction(
                given['conv_weight'][k][:, None], given['conv_bias'][k], given['x_proj'][k],
                given['dt_proj'][k], given['dt_bias'][k], (-given['A'][k]).log(), given['D'][k])
                for k in range(routes)))
        inputs |= {f'weight{i}_{j}': t for j, t in enumerate(flatten(weights))}
    return inputs


def weights_of(inputs):
    return [t for name, t in inputs.items() if name.startswith('weight')]


def blocks_of(inputs):
    return list(reference.split(weights_of(inputs), 2))


def product_dtype(inputs):
    return autocast_dtype(inputs['hidden']) or inputs['hidden'].dtype


def stream(inputs, begins):
    """The residual stream, which is never a half."""
    residual = inputs['residual']
    return None if begins else residual.to(torch.promote_types(residual.dtype, torch.float32))


def naive_mix(xz, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale):
    """In the dtype of ``xz`` but for the scan, as a user would write it."""
    results = []
    for k in range(len(A)):
        x, z = (xz.flip(1) if k else xz).chunk(2, dim=-1)
        u = F.conv1d(x.transpose(1, 2), conv[k][:, None].to(x.dtype), conv_bias[k].to(x.dtype),
                     padding=conv.shape[2] - 1, groups=x.shape[2])[..., :x.shape[1]]
        u = F.silu(u).transpose(1, 2)
        rank, state = dt_proj.shape[2], A.shape[2]
        dt, B, C = F.linear(u, x_proj[k].to(u.dtype)).split((rank, state, state), dim=-1)
        delta = F.softplus(F.linear(dt, dt_proj[k].to(u.dtype)).float() + dt_bias[k].float())
        h, y = 0, []
        for t in range(x.shape[1]):
            decay = (delta[:, t, :, None] * A[k].float()).exp()
            h = decay * h + (delta[:, t] * u[:, t].float())[..., None] * B[:, t, None].float()
            y.append((h * C[:, t, None].float()).sum(-1) + D[k].float() * u[:, t].float())
        y = torch.stack(y, 1).to(x.dtype) * F.silu(z)
        results.append(y.flip(1) if k else y)
    return scale * sum(results)


def spec(begins, scale, norm='rms', **kwargs):
    def call(inputs, backend=None, out_dtype=None):
        return mamba_blocks(inputs['hidden'], stream(inputs, begins), blocks_of(inputs), EPS, scale,
                            product_dtype(inputs))

    def arguments(inputs, out_dtype):
        return (inputs['hidden'], stream(inputs, begins), weights_of(inputs), 2, EPS, scale,
                product_dtype(inputs))

    return Spec(
        'mamba_blocks', call=call, make=partial(make, norm=norm), arguments=arguments,
        maps=('hidden', 'residual'), shapes=(), flops=flops,
        naive=lambda *args: reference.mamba_blocks(*args, mix=naive_mix),
        limits={torch.float64: 1e-10, torch.float32: 2e-5}, has_gradient=False, roundings=2,
        takes_out_dtype=False, **kwargs)


def flops(shape):
    batch, length, dim, inner, routes = shape
    scan = routes * inner * (4 + 36 + 4 + 9 * 16 + 1)
    return 2 * 2 * batch * length * (3 * inner * dim + scan)


def call_block(inputs, backend=None, out_dtype=None):
    weights, = reference.split(weights_of(inputs), 1)
    return mamba_block(inputs['hidden'].to(product_dtype(inputs)), stream(inputs, False), weights,
                       EPS, 0.5, product_dtype(inputs))


def arguments_of_block(inputs, out_dtype):
    weights, = reference.split(weights_of(inputs), 1)
    return (inputs['hidden'].to(product_dtype(inputs)), stream(inputs, False), *spread(weights),
            EPS, 0.5, product_dtype(inputs))


def naive_block(hidden, residual, *args):
    weights = [t for t in args[:-3] if t is not None]
    return reference.mamba_blocks(hidden, residual, weights, 1, *args[-3:], mix=naive_mix)


SPECS = [
    *(Spec('mamba_block_fwd', id=f'mamba_block with {routes}, {norm}', call=call_block,
           make=partial(make, blocks=1, norm=norm), arguments=arguments_of_block,
           maps=('hidden', 'residual'), shapes=(),
           kernel_shapes=((2, 5, 16, 32, routes), (1, 1, 8, 16, routes)),
           half_shapes=((2, 7, 16, 32, routes),),
           gpu_shapes=((2, 197, 192, 384, routes), (3, 129, 384, 768, routes),
                       (1, 67, 584, 1168, routes)),
           flops=lambda shape: flops(shape) // 2, naive=naive_block,
           roundings=4,  # of the norm, xz, the convolution, and dt, on the way to dt_proj
           limits={torch.float64: 1e-10, torch.float32: 2e-5}, takes_out_dtype=False)
      for norm in ('rms', 'ln') for routes in (1, 2)),
    spec(False, 0.5, kernel_shapes=((2, 5, 16, 32, 2), (1, 1, 8, 16, 2)),
         half_shapes=((2, 7, 16, 32, 2),), gpu_shapes=((2, 197, 192, 384, 2),)),
    spec(True, 1.0, id='mamba_blocks of a model, causal', kernel_shapes=((2, 5, 16, 32, 1),),
         half_shapes=((2, 7, 16, 32, 1),), gpu_shapes=((2, 197, 192, 384, 1),)),
    spec(False, 0.5, 'ln', id='mamba_blocks with LayerNorm',
         kernel_shapes=((2, 5, 16, 32, 2), (1, 1, 8, 16, 2)), half_shapes=((2, 7, 16, 32, 2),),
         gpu_shapes=((3, 67, 584, 1168, 2),)),
    spec(True, 1.0, 'ln', id='mamba_blocks of a model, causal, with LayerNorm',
         kernel_shapes=((2, 5, 16, 32, 1),), half_shapes=((2, 7, 16, 32, 1),),
         gpu_shapes=((3, 129, 384, 768, 1),))]
