import functools

import torch

from op_specs import Spec, randn
from op_specs.masa import places
from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.rmt_block import Weights, rmt_block

EPS = 1e-6


def make(batch, height, width, heads, head_dim, hidden, scaled=False):
    dim = heads * head_dim
    norm1, norm2 = (randn(dim, seed=i) / 2 + 1 for i in range(2))
    q, k, v, out = (randn(dim, dim, seed=i) / dim**0.5 for i in range(4))
    gammas = [1 + randn(1, 1, 1, dim, seed=i) / 2 if scaled else None for i in range(2)]
    biases = iter([randn(dim, seed=10 + i) for i in range(8)])
    weights = Weights(
        randn(dim, 1, 3, 3) / 3, next(biases), norm1, next(biases), q, next(biases), k,
        next(biases), v, next(biases), randn(dim, 1, 5, 5) / 5, next(biases), out, next(biases),
        norm2, next(biases), randn(hidden, dim) / dim**0.5, randn(hidden, seed=1),
        randn(hidden, 1, 3, 3) / 3, randn(hidden, seed=2), randn(dim, hidden) / hidden**0.5,
        randn(dim, seed=9), *gammas)
    given = {name: t for name, t in weights._asdict().items() if t is not None}
    return dict(x=randn(batch, height, width, dim), **given)


def weights_of(inputs):
    return Weights(**{name: inputs.get(name) for name in Weights._fields})


def factors(x):
    return torch.linspace(0.5, 2, len(x), device=x.device), None


def product_dtype(x):
    return autocast_dtype(x) or x.dtype


def spec(form, head_dim, scaled=False, **kwargs):
    def places_of(x):
        return places(x.unflatten(-1, (-1, head_dim)), True)

    def call(inputs, backend=None):
        x = inputs['x']
        return rmt_block(x, weights_of(inputs), *places_of(x), factors(x), form, EPS,
                         product_dtype(x))

    def arguments(inputs, out_dtype):
        x = inputs['x']
        return (x, *weights_of(inputs), *places_of(x), *factors(x), form == 'whole', EPS,
                product_dtype(x))

    def count(shape):
        batch, height, width, heads, _, hidden = shape
        dim, pixels = heads * head_dim, batch * height * width
        seen = height * width if form == 'whole' else height + width
        return 2 * pixels * (dim * (34 + 4 * dim + 2 * seen) + hidden * (2 * dim + 9))

    return Spec(
        'rmt_block', id=f'rmt_block {form}{" with layer scale" if scaled else ""}', call=call,
        make=functools.partial(make, scaled=scaled), arguments=arguments, shapes=(),
        capability=80, takes_out_dtype=False, roundings=6, flops=count,
        limits={torch.float64: 1e-10, torch.float32: 2e-5}, **kwargs)


SPECS = [
    spec('decomposed', 16, kernel_shapes=((2, 3, 5, 2, 16, 36), (1, 17, 2, 1, 16, 64)),
         half_shapes=((2, 4, 3, 2, 16, 40),), gpu_shapes=((2, 14, 14, 8, 16, 384),)),
    spec('whole', 32, True, kernel_shapes=((2, 4, 3, 1, 32, 48),),
         half_shapes=((2, 3, 3, 1, 32, 64),), gpu_shapes=((2, 7, 7, 4, 32, 512),)),
    spec('decomposed', 32, True, kernel_shapes=((3, 1, 1, 1, 32, 32),))]
