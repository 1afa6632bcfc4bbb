from dataclasses import replace

import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import (
    add_norm,
    evaluate_batch_norm,
    expand_norm,
    layer_norm,
    merge_norm,
    rms_norm,
)

SHAPES = (2, 3, 1, 8), (1, 1, 1, 4), (2, 3, 5, 6), (3, 5, 7, 96)
KERNEL_SHAPES = (2, 3, 2, 8), (1, 1, 1, 4), (2, 3, 3, 100), (2, 3, 1, 768), (1, 1, 3, 4096)


def make_norm(*shape):
    return dict(x=randn(*shape) * 2 + 1, weight=randn(shape[-1], seed=2),
                bias=randn(shape[-1], seed=3))


def make_sum(*shape):
    return dict(x=randn(*shape) * 2 + 1, branch=randn(*shape, seed=1))


def make_add_norm(*shape):
    return make_sum(*shape) | {k: t for k, t in make_norm(*shape).items() if k != 'x'}


def without_bias(inputs):
    return {k: t for k, t in inputs.items() if k != 'bias'}


def scale(x):
    """A factor for each sample, which has no gradient."""
    return torch.linspace(0.5, 2, len(x), device=x.device)


def make_batch_norm(*shape):
    return make_sum(*shape) | {name: randn(shape[-1], seed=i) for i, name in enumerate(
        ('mean', 'variance', 'weight', 'bias'))}


def make_patches(batch, height, width, dim, factor=0):
    """Of dim channels of a pixel; to be merged, or to be expanded."""
    of_norm, of_x = (dim, factor**2 * dim) if factor else (4 * dim, dim)
    return dict(x=randn(batch, height, width, of_x) * 2 + 1, weight=randn(of_norm, seed=2),
                bias=randn(of_norm, seed=3))


def factor_of(inputs):
    return round((inputs['x'].shape[-1] // inputs['weight'].numel()) ** 0.5) or 1


def batch_norm_arguments(inputs, residual, relu):
    return (inputs['x'], inputs['mean'], inputs['variance'].square(), inputs['weight'],
            inputs['bias'], inputs['branch'] if residual else None, relu)


def batch_norm_spec(residual, relu, **kwargs):
    def call(inputs, backend=None):
        *args, branch, _ = batch_norm_arguments(inputs, residual, relu)
        return evaluate_batch_norm(*args, 1e-2, residual=branch, relu=relu)

    return Spec(
        'evaluate_batch_norm', call=call, make=make_batch_norm,
        arguments=lambda inputs, out_dtype: (*batch_norm_arguments(inputs, residual, relu), 1e-2),
        kernel_shapes=((2, 3, 2, 8), (1, 1, 1, 4), (2, 9, 9, 36), (1, 2, 3, 516)),
        half_shapes=((3, 5, 7, 96),), maps=('x', 'branch'), takes_out_dtype=False,
        has_gradient=False, shapes=((2, 3, 1, 8), (1, 1, 1, 3)), **kwargs)


SPECS = [
    batch_norm_spec(True, True, wrong=(
        ('mean', cut(0), 'expects x .* and mean of shape'),
        ('branch', cut(1), 'residual of shape'))),
    replace(batch_norm_spec(False, False), id='evaluate_batch_norm alone'),
    Spec('add_norm', id='layer_norm',
         call=lambda inputs, backend=None, **options: layer_norm(**inputs, eps=1e-3, **options),
         make=make_norm,
         arguments=lambda inputs, out_dtype: (inputs['x'], None, None, inputs['weight'],
                                              inputs['bias'], 1e-3, out_dtype),
         shapes=SHAPES, kernel_shapes=KERNEL_SHAPES, half_shapes=((2, 3, 5, 48),),
         autocast_dtype=torch.float32,
         wrong=(('weight', cut(0), 'expects weight of shape'),
                ('bias', cut(0), 'expects bias of shape'))),
    Spec('add_norm', id='rms_norm',
         call=lambda inputs, backend=None, **options: rms_norm(**inputs, eps=1e-3, **options),
         make=lambda *shape: without_bias(make_norm(*shape)),
         arguments=lambda inputs, out_dtype: (inputs['x'], None, None, inputs['weight'], None, 1e-3,
                                              out_dtype),
         shapes=SHAPES, kernel_shapes=KERNEL_SHAPES, half_shapes=((2, 3, 5, 48),),
         autocast_dtype=torch.float32, wrong=(('weight', cut(0), 'expects weight of shape'),)),
    Spec('add_norm', id='add_rms_norm',
         call=lambda inputs, backend=None, **options: add_norm(
             **inputs, bias=None, eps=1e-3, scale=scale(inputs['x']), **options),
         make=lambda *shape: without_bias(make_add_norm(*shape)),
         arguments=lambda inputs, out_dtype: (
             inputs['x'], inputs['branch'], scale(inputs['x']), inputs['weight'], None, 1e-3,
             out_dtype),
         shapes=SHAPES, kernel_shapes=KERNEL_SHAPES, half_shapes=((3, 5, 7, 96), (2, 2, 3, 1536)),
         maps=('x', 'branch'), autocast_dtype=torch.float32),
    Spec('add_norm',
         call=lambda inputs, backend=None, **options: add_norm(
             **inputs, eps=1e-3, scale=scale(inputs['x']), **options),
         make=make_add_norm,
         arguments=lambda inputs, out_dtype: (
             inputs['x'], inputs['branch'], scale(inputs['x']), inputs['weight'], inputs['bias'],
             1e-3, out_dtype),
         shapes=SHAPES, kernel_shapes=KERNEL_SHAPES, half_shapes=((3, 5, 7, 96), (2, 2, 3, 1536)),
         maps=('x', 'branch'), autocast_dtype=torch.float32,
         wrong=(('branch', cut(1), 'expects branch of shape'),
                ('weight', cut(0), 'expects weight of shape'))),
    Spec('expand_norm',
         call=lambda inputs, backend=None, **options: expand_norm(
             **inputs, factor=factor_of(inputs), eps=1e-3, **options),
         make=make_patches,
         arguments=lambda inputs, out_dtype: (*inputs.values(), factor_of(inputs), 1e-3, out_dtype),
         shapes=((2, 1, 3, 3, 2), (1, 1, 1, 4, 1), (2, 3, 2, 8, 4)),
         kernel_shapes=((2, 3, 5, 24, 4), (3, 5, 2, 40, 2), (1, 2, 3, 384, 2), (2, 1, 1, 96, 3)),
         half_shapes=((2, 5, 3, 24, 4), (2, 3, 3, 192, 2)), autocast_dtype=torch.float32,
         wrong=(('weight', cut(0), 'expects x'), ('bias', cut(0), 'weight and bias'))),
    Spec('merge_norm',
         call=lambda inputs, backend=None, **options: merge_norm(**inputs, eps=1e-3, **options),
         make=make_patches,
         arguments=lambda inputs, out_dtype: (*inputs.values(), 1e-3, out_dtype),
         shapes=((2, 2, 3, 2), (1, 5, 4, 3), (2, 2, 2, 4)),
         kernel_shapes=((2, 4, 6, 8), (3, 5, 7, 20), (2, 3, 2, 384), (1, 2, 2, 96)),
         half_shapes=((2, 6, 5, 96), (2, 4, 4, 12)), autocast_dtype=torch.float32,
         wrong=(('weight', cut(0), 'expects x'), ('bias', cut(0), 'weight and bias'))),
    Spec('add_norm', id='sum',
         call=lambda inputs, backend=None, **options: add_norm(**inputs, weight=None, bias=None,
                                                               **options)[0],
         make=make_sum,
         arguments=lambda inputs, out_dtype: (inputs['x'], inputs['branch'], None, None, None, 1e-5,
                                              out_dtype),
         shapes=((2, 3, 1, 8),), kernel_shapes=((3, 2, 2, 8),), half_shapes=((3, 2, 2, 8),),
         maps=('x', 'branch'))]
