from dataclasses import replace

import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import ssd

NAMES = 'x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias', 'z', 'initial_state'


def make(*shape):
    """Shapes are (batch, length, heads, dim, groups, state)."""
    batch, length, heads, dim, groups, state = shape
    return dict(x=randn(batch, length, heads, dim), dt=randn(batch, length, heads, seed=1),
                A=-randn(heads).exp(), B=randn(batch, length, groups, state, seed=2),
                C=randn(batch, length, groups, state, seed=3), D=randn(heads, seed=4),
                dt_bias=randn(heads, seed=5) - 1)


def make_bare(*shape):
    inputs = make(*shape)
    return {name: t.abs() if name == 'dt' else t for name, t in inputs.items()
            if name not in ('D', 'dt_bias')}


def make_stateful(*shape):
    batch, _, heads, dim, _, state = shape
    inputs = make(*shape)
    return inputs | dict(z=randn(*inputs['x'].shape, seed=6), D=randn(heads, dim, seed=7),
                         initial_state=randn(batch, heads, dim, state, seed=8))


def seq_idx(inputs):
    """Packed sequences of 3 tokens, the first of them of index 0."""
    batch, length, _ = inputs['dt'].shape
    time = torch.arange(length, dtype=torch.int32, device=inputs['dt'].device)
    return (time // 3).expand(batch, length).contiguous()


def flops(shape):
    batch, length, heads, dim, _, state = shape
    return 6 * batch * length * heads * dim * state


def spec(softplus=True, limit=(0.0, float('inf')), packed=False, final=False, reverse=False,
         **kwargs):
    def index(inputs):
        return seq_idx(inputs) if packed else None

    def call(inputs, **options):
        found = ssd(*map(inputs.get, NAMES[:6]), dt_bias=inputs.get('dt_bias'), z=inputs.get('z'),
                    initial_state=inputs.get('initial_state'), seq_idx=index(inputs),
                    dt_softplus=softplus, dt_limit=limit, return_final_state=final,
                    reverse=reverse, **options)
        # In the dtype of the result, which generic tests look at.
        return (found[0], found[1].to(found[0].dtype)) if final else found

    return Spec(
        'ssd_fwd', call=call,
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, NAMES), index(inputs), softplus, *limit, final, reverse),
        maps=('x', 'dt', 'B', 'C') + (('z', 'initial_state') if final else ()),
        # A GPU multiplies in half precision: x with its weight, and scores.
        roundings=2, takes_out_dtype=False, capability=80,
        **dict(backends=('reference', 'chunked', 'cuda'), flops=flops) | kwargs)


SPECS = [spec(
    make=make,
    shapes=((2, 5, 2, 3, 1, 2), (1, 1, 1, 1, 1, 1), (2, 2, 4, 3, 2, 5), (1, 17, 2, 8, 2, 16),
            (3, 50, 4, 4, 1, 8), (1, 150, 6, 5, 3, 7)),
    kernel_shapes=((2, 21, 2, 8, 1, 16), (1, 1, 1, 16, 1, 8), (2, 70, 4, 24, 2, 16),
                   (1, 150, 2, 40, 1, 32)),
    half_shapes=((2, 21, 2, 8, 1, 16), (1, 70, 4, 32, 2, 64)),
    gpu_shapes=((3, 196, 12, 64, 1, 64), (2, 49, 24, 64, 1, 64), (1, 5000, 6, 32, 3, 16),
                (2, 300, 8, 64, 2, 128), (2, 130, 4, 16, 1, 256), (1, 65, 6, 128, 1, 32),
                (1, 20000, 2, 64, 1, 64)),
    wrong=(('C', cut(3), 'expects C of shape'), ('D', cut(0), 'expects D of shape'),
           ('B', lambda B: B.repeat(1, 1, 3, 1), 'divisible by'), ('dt', cut(2), 'expects dt of'),
           ('x', lambda x: x[0], r'expects x \(B, L, H, P\)'),
           ('A', lambda A: A.to(torch.complex64), 'complex')))]
SPECS.append(replace(spec(
    softplus=False, make=make_bare, shapes=((2, 5, 2, 3, 2, 2), (1, 70, 2, 4, 1, 3)),
    kernel_shapes=((2, 70, 2, 16, 2, 8),), gpu_shapes=((2, 300, 4, 64, 1, 64),)),
    id='ssd without softplus and skip'))
SPECS.append(replace(spec(
    limit=(0.2, 0.7), packed=True, final=True, reverse=True, make=make_stateful,
    kernel_shapes=((2, 70, 4, 16, 2, 16),), half_shapes=((2, 70, 4, 16, 2, 16),),
    gpu_shapes=((2, 300, 4, 64, 2, 64), (1, 9000, 2, 64, 1, 64)),
    shapes=((2, 5, 2, 3, 1, 2), (1, 1, 2, 3, 2, 4), (2, 20, 4, 3, 2, 2), (1, 130, 2, 4, 1, 5)),
    wrong=(('z', cut(3), 'expects z of shape'),
           ('initial_state', cut(3), 'expects initial_state of shape'),
           ('D', cut(1), 'expects D of shape'))),
    id='ssd with limits, gate, states and packed sequences, reversed'))
SPECS.append(replace(spec(
    final=True, make=make_stateful, shapes=((2, 5, 2, 3, 2, 2), (2, 21, 4, 3, 1, 2)),
    kernel_shapes=((2, 21, 2, 8, 1, 16),), half_shapes=((2, 70, 2, 16, 1, 16),),
    gpu_shapes=((2, 300, 4, 64, 1, 64),)),
    id='ssd with gate and states'))
