import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import conv_norm, conv_norm_gelu, dwconv_add, dwconv_silu

OTHER_CHANNELS = 'channels, but got .* channels instead'


def make_dwconv(*shape):
    return dict(x_BHWD=randn(*shape), weight=randn(shape[3], 1, 3, 3), bias=randn(shape[3]))


def scale_of(x):
    """A factor of the branch for each sample, which has no gradient."""
    return torch.linspace(0.5, 2, len(x), device=x.device)


def make_conv(x, out, size):
    return dict(x=x, weight=randn(out, x.shape[3], size, size) / size,
                **{name: randn(out, seed=i) for i, name in enumerate(
                    ('bias', 'norm_weight', 'norm_bias'))})


def make_stem(*shape):
    """(B, C, H, W, C')."""
    inputs = make_conv(randn(*shape[:4]).permute(0, 2, 3, 1), shape[4], 3)
    return inputs | dict(x=inputs['x'].permute(0, 3, 1, 2))


def conv_spec(stride, padding, size, **kwargs):
    """Shapes are (B, H, W, C, C')."""
    return Spec(
        'conv_norm', id=f'conv_norm of {size}x{size}',
        call=lambda inputs, backend=None, **options: conv_norm(
            *inputs.values(), stride=stride, padding=padding, **options),
        make=lambda *shape: make_conv(randn(*shape[:4]), shape[4], size),
        arguments=lambda inputs, out_dtype: (*inputs.values(), stride, padding, 1e-5, out_dtype),
        flops=lambda shape: 2 * shape[0] * (-(-shape[1] // stride)) * (-(-shape[2] // stride))
        * shape[3] * shape[4] * size**2,
        autocast_dtype=torch.float32,
        limits={torch.float64: 1e-11, torch.float32: 2e-5},
        wrong=(('x', cut(3), OTHER_CHANNELS), ('norm_bias', cut(0), 'of shape'),
               ('x', lambda x: x[0], 'four dimensions')), **kwargs)


SPECS = [
    Spec('dwconv_silu',
         call=lambda inputs, backend=None: dwconv_silu(**inputs),
         make=make_dwconv,
         arguments=lambda inputs, out_dtype: tuple(inputs.values()),
         shapes=((2, 3, 2, 2), (1, 1, 1, 4), (2, 9, 1, 3)),
         kernel_shapes=((2, 3, 5, 8), (1, 1, 1, 4), (2, 9, 1, 36), (2, 5, 13, 268)),
         half_shapes=((3, 7, 7, 128), (2, 1, 9, 96)),
         maps=('x_BHWD',), takes_out_dtype=False,
         flops=lambda shape: 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3],
         wrong=(('weight', cut(0), r'expects x \(B, H, W, D\)'),
                ('bias', cut(0), r'expects x \(B, H, W, D\)'),
                ('x_BHWD', lambda x: x[0], r'expects x \(B, H, W, D\)'))),
    Spec('dwconv_silu', id='dwconv_silu without bias',
         call=lambda inputs, backend=None: dwconv_silu(**inputs),
         make=lambda *shape: {k: t for k, t in make_dwconv(*shape).items() if k != 'bias'},
         arguments=lambda inputs, out_dtype: (*inputs.values(), None),
         shapes=((2, 3, 2, 2),), kernel_shapes=((2, 4, 3, 8),), half_shapes=((1, 14, 30, 8),),
         maps=('x_BHWD',), takes_out_dtype=False,
         flops=lambda shape: 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3]),
    Spec('dwconv_add',
         call=lambda inputs, backend=None: dwconv_add(
             **inputs, scale=scale_of(inputs['x_BHWD'])),
         make=lambda *shape: make_dwconv(*shape) | dict(branch=randn(*shape, seed=1)),
         arguments=lambda inputs, out_dtype: (*inputs.values(), scale_of(inputs['x_BHWD'])),
         shapes=((2, 3, 2, 2), (1, 1, 1, 4), (2, 9, 1, 3)),
         kernel_shapes=((2, 3, 5, 8), (1, 1, 1, 4), (2, 5, 13, 268)),
         half_shapes=((3, 7, 7, 128), (2, 1, 9, 96)),
         maps=('x_BHWD', 'branch'), takes_out_dtype=False,
         flops=lambda shape: 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3],
         wrong=(('weight', cut(0), r'expects x \(B, H, W, D\)'),
                ('branch', cut(1), r'expects branch \(B, H, W, D\)'),
                ('x_BHWD', lambda x: x[0], r'expects x \(B, H, W, D\)'))),
    Spec('dwconv_add', id='dwconv_add of a map alone',
         call=lambda inputs, backend=None: dwconv_add(**inputs),
         make=make_dwconv,
         arguments=lambda inputs, out_dtype: (*inputs.values(), None, None),
         shapes=((2, 3, 2, 2),), kernel_shapes=((2, 4, 3, 8),), half_shapes=((1, 14, 30, 8),),
         maps=('x_BHWD',), takes_out_dtype=False,
         flops=lambda shape: 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3]),
    conv_spec(2, 1, 3, shapes=((2, 3, 4, 2, 3), (1, 1, 1, 4, 6)),
              kernel_shapes=((2, 9, 6, 8, 36), (1, 1, 1, 4, 516)), half_shapes=((2, 9, 6, 8, 36),)),
    conv_spec(4, 0, 4, shapes=((2, 4, 8, 2, 3),), kernel_shapes=((3, 8, 12, 3, 48),)),
    Spec('conv_norm_gelu',
         call=lambda inputs, backend=None: conv_norm_gelu(*inputs.values()),
         make=make_stem,
         arguments=lambda inputs, out_dtype: (*inputs.values(), 1e-5, out_dtype),
         shapes=((2, 2, 3, 4, 3), (1, 3, 1, 1, 4), (2, 3, 7, 9, 5)),
         kernel_shapes=((2, 3, 5, 7, 16),),
         half_shapes=((2, 3, 21, 38, 48), (1, 3, 2, 2, 16), (3, 3, 2, 70, 64), (2, 3, 64, 33, 32)),
         takes_out_dtype=False,
         flops=lambda shape: 2 * 9 * shape[0] * shape[1] * (-(-shape[2] // 2))
         * (-(-shape[3] // 2)) * shape[4],
         limits={torch.float64: 1e-11, torch.float32: 2e-5},
         wrong=(('x', cut(1), OTHER_CHANNELS), ('bias', cut(0), 'of shape')))]
