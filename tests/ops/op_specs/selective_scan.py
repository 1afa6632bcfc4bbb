from dataclasses import replace

import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import selective_scan_inputs

NAMES = 'u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'


def make(*shape):
    """Shapes are (batch, groups, dim, length, state)."""
    return selective_scan_inputs(*shape, dtype=torch.float64)


def make_positive(*shape):
    """For a scan without softplus."""
    inputs = make(*shape)
    return inputs | dict(delta=inputs['delta'].abs(), delta_bias=inputs['delta_bias'].abs())


def make_bare(*shape):
    inputs = make(*shape)
    return {name: inputs[name] for name in NAMES[:5]}


def flops(shape):
    batch, groups, dim, length, state = shape
    return 2 * batch * groups * dim * length * (9 * state + 1)


def make_gated(*shape):
    inputs = make(*shape)
    batch, channels, _ = inputs['u'].shape
    return inputs | dict(z=randn(*inputs['u'].shape, seed=7),
                         initial_state=randn(batch, channels, shape[4], seed=8))


def make_gated_alone(*shape):
    return {name: t for name, t in make_gated(*shape).items() if name != 'initial_state'}


def make_stateful(*shape):
    return {name: t for name, t in make_gated(*shape).items() if name not in ('z', 'D')}


def make_stateful_positive(*shape):
    return make_stateful(*shape) | make_positive(*shape)


def spec(softplus, reverse=False, final=False, **kwargs):
    maps = 'u', 'delta', 'B', 'C'
    if reverse or final:
        maps += tuple(kwargs['make'](1, 1, 1, 1, 1).keys() & {'z', 'initial_state'})

    def call(inputs, **options):
        found = selective_scan(
            *[inputs.get(name) for name in NAMES[:6]], delta_bias=inputs.get('delta_bias'),
            delta_softplus=softplus, z=inputs.get('z'), initial_state=inputs.get('initial_state'),
            return_final_state=final, reverse=reverse, **options)
        # In the dtype of the result, which generic tests look at.
        return (found[0], found[1].to(found[0].dtype)) if final else found

    return Spec(
        'selective_scan_fwd', call=call,
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, NAMES), inputs.get('z'), inputs.get('initial_state'), softplus, final,
            reverse, out_dtype),
        maps=maps,
        **dict(backends=('reference', 'chunked', 'cuda', 'triton'), kernels=('cuda', 'triton'),
               flops=flops) | kwargs)


SPECS = [spec(
    True, make=make,
    shapes=((2, 2, 2, 5, 2), (1, 1, 1, 1, 1), (2, 1, 3, 2, 1), (1, 1, 2, 17, 16), (1, 4, 5, 37, 1),
            (3, 2, 4, 50, 4), (2, 3, 2, 65, 16), (1, 4, 2, 300, 2)),
    kernel_shapes=((2, 2, 3, 11, 1), (1, 1, 1, 1, 1), (2, 1, 3, 2, 4), (1, 2, 40, 20, 16),
                   (1, 1, 35, 3, 1)),
    interpreter_shapes=((2, 2, 3, 11, 1), (1, 1, 35, 3, 1), (1, 1, 2, 17, 16)),
    half_shapes=((2, 2, 4, 15, 1), (2, 2, 40, 21, 16)),
    gpu_shapes=((1, 4, 50, 37, 1), (3, 2, 40, 200, 16), (2, 3, 210, 65, 5),
                (1, 4, 40, 20000, 16), (2, 1, 33, 104, 64), (2, 4, 96, 196, 1)),
    wrong=(('C', cut(3), 'expects C of shape'), ('D', cut(0), 'expects D of shape'),
           ('B', lambda B: B.repeat(1, 3, 1, 1), 'divisible by'),
           ('u', lambda u: u[0], r'expects u \(B, K\*D, L\)')))]
SPECS.append(replace(spec(
    False, make=make_positive, shapes=((2, 2, 2, 5, 2), (3, 2, 4, 50, 4), (1, 4, 2, 300, 2)),
    kernel_shapes=((2, 3, 21, 65, 5),), interpreter_shapes=((2, 2, 3, 9, 3),),
    gpu_shapes=((2, 3, 210, 65, 5),)),
    id='selective_scan without softplus'))
SPECS.append(replace(spec(
    True, make=make_bare, shapes=((2, 2, 3, 9, 2),), kernel_shapes=((2, 2, 20, 30, 4),),
    interpreter_shapes=((2, 2, 3, 9, 3),)),
    id='selective_scan without skip and bias'))
# What the world of one dimension asks for beside it.
SPECS.append(replace(spec(
    True, reverse=True, make=make_gated_alone, shapes=((2, 2, 2, 5, 2), (1, 1, 3, 65, 3)),
    interpreter_shapes=((2, 2, 3, 9, 3),), kernel_shapes=((2, 2, 3, 9, 3), (1, 1, 40, 20, 16)),
    half_shapes=((2, 1, 40, 21, 16),), gpu_shapes=((2, 1, 200, 197, 16),)),
    id='selective_scan with gate, reversed'))
SPECS.append(replace(spec(
    True, reverse=True, final=True, make=make_gated, kernels=('cuda',),
    kernel_shapes=((2, 2, 3, 11, 2), (1, 1, 1, 1, 1), (1, 1, 40, 20, 16)),
    half_shapes=((2, 1, 40, 21, 16),), gpu_shapes=((2, 2, 200, 197, 16), (1, 1, 40, 5000, 4)),
    shapes=((2, 2, 2, 5, 2), (1, 1, 1, 1, 1), (2, 1, 3, 2, 1), (1, 2, 2, 17, 16), (1, 1, 3, 65, 3),
            (2, 2, 130, 21, 16)),
    wrong=(('z', cut(2), 'expects z of shape'),
           ('initial_state', cut(2), 'expects initial_state of shape'),
           ('A', lambda A: A.to(torch.complex64), 'complex'))),
    id='selective_scan with gate and states, reversed'))
SPECS.append(replace(spec(
    False, final=True, make=make_stateful_positive, kernels=('cuda',),
    kernel_shapes=((2, 2, 3, 11, 2),),
    shapes=((2, 2, 3, 11, 2), (1, 1, 1, 1, 1), (1, 1, 3, 65, 3))),
    id='selective_scan with states'))
