from math import prod

from op_specs import Spec, cut, randn
from vmamba_mm.ops import conv_mlp, linear_relu, mlp

HIDDEN, OUT = 24, 20


def make_linear(*shape):
    return dict(x=randn(*shape), weight=randn(OUT, shape[-1]) / shape[-1]**0.5, bias=randn(OUT))


def make(*shape):
    dim = shape[-1]
    return dict(x=randn(*shape) * 3, w1=randn(HIDDEN, dim) / dim**0.5, b1=randn(HIDDEN),
                w2=randn(OUT, HIDDEN, seed=1) / HIDDEN**0.5, b2=randn(OUT))


def make_conv(*shape):
    inputs = make(*shape)
    rest = {name: inputs.pop(name) for name in ('w2', 'b2')}
    return inputs | dict(conv_weight=randn(HIDDEN, 1, 3, 3, seed=2) / 3,
                         conv_bias=randn(HIDDEN, seed=3)) | rest


SPECS = [Spec(
    'conv_mlp',
    call=lambda inputs, backend=None: conv_mlp(**inputs),
    make=make_conv,
    arguments=lambda inputs, out_dtype: tuple(inputs.values()),
    shapes=((2, 2, 3, 5), (2, 1, 1, 3)),
    kernel_shapes=((2, 2, 3, 4), (1, 3, 5, 24)), half_shapes=((2, 3, 5, 24),),
    takes_out_dtype=False, roundings=3,
    flops=lambda shape: 2 * HIDDEN * (shape[-1] + OUT + 9) * prod(shape[:-1]),
    wrong=(('w1', cut(1), r'conv_mlp expects x \(B, H, W, C\)'),
           ('conv_weight', cut(0), 'conv_mlp expects'))), Spec(
    'linear_relu',
    call=lambda inputs, backend=None: linear_relu(**inputs),
    make=make_linear,
    arguments=lambda inputs, out_dtype: tuple(inputs.values()),
    shapes=((2, 3), (2, 3, 5, 7)),
    kernel_shapes=((2, 4), (2, 3, 5, 24)), half_shapes=((2, 3, 5, 24), (40, 260)),
    takes_out_dtype=False,
    flops=lambda shape: 2 * OUT * prod(shape),
    wrong=(('weight', cut(1), r'linear_relu expects x \(\.\.\., C\)'),
           ('bias', cut(0), 'linear_relu expects'))), Spec(
    'mlp',
    call=lambda inputs, backend=None: mlp(**inputs),
    make=make,
    arguments=lambda inputs, out_dtype: tuple(inputs.values()),
    shapes=((2, 3), (2, 3, 5, 7)),
    kernel_shapes=((2, 4), (2, 3, 5, 24)), half_shapes=((2, 3, 5, 24), (40, 260)),
    takes_out_dtype=False,
    flops=lambda shape: 2 * HIDDEN * (shape[-1] + OUT) * prod(shape[:-1]),
    wrong=(('w1', cut(1), r'mlp expects x \(\.\.\., C\)'), ('b2', cut(0), 'mlp expects')))]
