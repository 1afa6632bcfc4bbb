import functools

import torch

from op_specs import Spec, randn
from op_specs.ss2d_scan import naive_norm
from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.vss_block import OF_MLP, Weights, reference, vss_block, vss_blocks
from vmamba_mm.testing import ss2d_scan_inputs

EPS = 1e-5


def make(batch, height, width, dim, inner, state=1, gate=False, mlp=True):
    """With 4 * dim hidden channels, unless there is no ``mlp``, and R = 2."""
    scan = ss2d_scan_inputs(1, inner, 1, 1, state=state, dtype=torch.float64)
    norm1, norm2, out_norm = (randn(size, seed=i) / 2 + 1
                              for i, size in enumerate((dim, dim, inner)))
    weights = Weights(
        norm1=norm1, norm1_bias=randn(dim, seed=3),
        in_proj=randn(2 * inner if gate else inner, dim) / dim**0.5,
        conv=randn(inner, 1, 3, 3) / 3, x_proj=scan['x_proj_weight'],
        dt_projs=scan['dt_projs_weight'], dt_bias=scan['dt_projs_bias'],
        A_logs=(-scan['A']).log(), D=scan['D'], out_norm=out_norm,
        out_norm_bias=randn(inner, seed=4), out_proj=randn(dim, inner) / inner**0.5, norm2=norm2,
        norm2_bias=randn(dim, seed=5), fc1=randn(4 * dim, dim) / dim**0.5, fc1_bias=randn(4 * dim),
        fc2=randn(dim, 4 * dim) / (4 * dim)**0.5, fc2_bias=randn(dim, seed=6),
        conv_bias=randn(inner, seed=7))
    inputs = dict(x=randn(batch, height, width, dim), **weights._asdict())
    return {name: t for name, t in inputs.items() if mlp or name not in OF_MLP}


def weights_of(inputs):
    """All, None for what there is not."""
    return Weights(**{name: inputs.get(name) for name in Weights._fields})


def factors(x):
    return torch.linspace(0.5, 2, len(x), device=x.device), None


def product_dtype(x):
    return autocast_dtype(x) or x.dtype


def call(inputs, backend=None, out_dtype=None):
    x = inputs['x']
    return vss_block(x, weights_of(inputs), factors(x), EPS, product_dtype(x), out_dtype or x.dtype)


def call_blocks(inputs, backend=None, out_dtype=None):
    x = inputs['x']
    return vss_blocks(x, [weights_of(inputs)] * 2, EPS, product_dtype(x), out_dtype or x.dtype)


def arguments(inputs, out_dtype):
    x = inputs['x']
    return (x, *weights_of(inputs), *factors(x), EPS, product_dtype(x), out_dtype)


def arguments_of_blocks(inputs, out_dtype):
    x, *weights = inputs.values()
    return x, weights * 2, 'fc1' in inputs, True, EPS, product_dtype(x), out_dtype


def naive(x, *args):
    return reference.vss_block(x, Weights._make(args[:19]), *args[19:], scan_norm=naive_norm)


def naive_blocks(x, weights, has_mlp, has_conv_bias, eps, dtype, out_dtype):
    names = [name for name in Weights._fields if has_mlp or name not in OF_MLP]
    block = weights_of(dict(zip(names, weights, strict=False)))
    for _ in range(2):
        x = naive(x, *block, None, None, eps, dtype, x.dtype)
    return x


def flops(shape, state=1, gate=False, mlp=True):
    batch, height, width, dim, inner = shape
    scan = 4 * inner * (2 + 2 * state + 2) + 4 * inner * (9 * state + 1)
    products = (3 if gate else 2) * inner * dim + 8 * dim * dim * mlp
    return 2 * batch * height * width * (products + 9 * inner + scan)


LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
VANILLA = dict(state=16, gate=True, mlp=False)
MIXED = dict(state=3, gate=True)


def spec(name, id_, kernel_shapes, half_shapes, gpu_shapes=(), **options):
    blocks = name == 'vss_block'
    return Spec(
        name, id=id_, call=call_blocks if blocks else call,
        make=functools.partial(make, **options),
        arguments=arguments_of_blocks if blocks else arguments, shapes=(),
        kernel_shapes=kernel_shapes, half_shapes=half_shapes, gpu_shapes=gpu_shapes,
        naive=naive_blocks if blocks else naive,
        flops=lambda shape: (2 if blocks else 1) * flops(shape, **options), limits=LIMITS,
        has_gradient=not blocks, roundings=2)


SPECS = [
    spec('vss_block_fwd', '', ((2, 5, 6, 32, 32), (3, 1, 1, 32, 64)), ((2, 7, 7, 32, 32),),
         ((2, 14, 14, 96, 192),)),
    spec('vss_block', 'vss_blocks', ((2, 5, 6, 32, 32),), ((2, 7, 7, 32, 32),)),
    # A vanilla VMamba's, and what no published model has: an MLP beside the gate.
    spec('vss_block_fwd', 'vanilla_block', ((2, 5, 6, 20, 40), (3, 1, 1, 32, 64)),
         # The last has so many channels that several blocks give the gradients by dt, B and C.
         ((2, 7, 7, 32, 64), (1, 2, 3, 16, 208)), ((2, 14, 14, 96, 192), (1, 5, 3, 192, 384)),
         **VANILLA),
    spec('vss_block', 'vanilla_blocks', ((2, 5, 6, 32, 64),), ((2, 7, 7, 32, 64),), **VANILLA),
    spec('vss_block_fwd', 'gated_block', ((2, 5, 6, 24, 24),), ((2, 5, 7, 32, 32),), **MIXED)]
