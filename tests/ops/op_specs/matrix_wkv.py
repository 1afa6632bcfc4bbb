from dataclasses import replace

import torch
import torch.nn.functional as F

from op_specs import Spec, cut, randn
from vmamba_mm.ops import wkv6, wkv7

NAMES6 = 'r', 'k', 'v', 'w', 'u', 'initial_state'
NAMES7 = 'r', 'w', 'k', 'v', 'a', 'b', 'initial_state'


def make6(*shape):
    """Shapes are (batch, length, heads, channels of a key, of a value)."""
    batch, length, heads, size, dim = shape
    r, k, w = (randn(batch, length, heads, size, seed=i) for i in range(3))
    return dict(r=r, k=k, v=randn(batch, length, heads, dim, seed=3), w=w, u=randn(heads, size))


def make7(*shape):
    """Keys of length 1 are removed in part, as in the model: else states grow without limit."""
    inputs = make6(*shape)
    del inputs['u']
    key = F.normalize(randn(*inputs['k'].shape, seed=4), dim=-1)
    return inputs | dict(a=-key, b=key * randn(*inputs['k'].shape, seed=5).sigmoid())


def with_state(make):
    def make_stateful(*shape):
        batch, _, heads, size, dim = shape
        return make(*shape) | dict(initial_state=randn(batch, heads, size, dim, seed=6))

    return make_stateful


def spec(op, make, names, products, **kwargs):
    def call(inputs, **options):
        has_state = 'initial_state' in inputs
        found = op(*map(inputs.get, names[:-1]), initial_state=inputs.get('initial_state'),
                   return_final_state=has_state, **options)
        # In the dtype of the result, which generic tests look at.
        return (found[0], found[1].to(found[0].dtype)) if has_state else found

    return Spec(
        f'{op.__name__}_fwd', call=call, make=make,
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, names), 'initial_state' in inputs),
        # First one that y and the final state depend on.
        maps=('k', *(name for name in names if name not in ('k', 'u', 'initial_state'))),
        backends=('reference', 'chunked'), kernels=(), takes_out_dtype=False,
        flops=lambda shape: 2 * products * shape[0] * shape[1] * shape[2] * shape[3] * shape[4],
        **kwargs)


SHAPES = ((2, 5, 2, 3, 2), (3, 17, 2, 4, 5), (1, 70, 3, 8, 8))
#: Without a state, wkv6 of a single token does not depend on w.
SHAPES_WITH_STATE = ((2, 5, 2, 3, 2), (1, 1, 1, 1, 1), (2, 35, 2, 4, 3))
SPECS = [
    spec(wkv6, make6, NAMES6, 3, shapes=SHAPES, wrong=(
        ('r', lambda r: r[0], r'wkv6 expects r \(B, T, H, N\)'),
        ('k', cut(3), 'expects k of shape'), ('v', cut(1), 'expects v of shape'),
        ('w', cut(1), 'expects w of shape'), ('u', cut(0), 'expects u of shape'),
        ('w', lambda w: w.to(torch.complex64), 'real tensors'))),
    spec(wkv7, make7, NAMES7, 5, shapes=SHAPES, wrong=(
        ('v', lambda v: v[0], r'wkv7 expects r \(B, T, H, N\)'),
        ('w', cut(3), 'expects w of shape'), ('a', cut(1), 'expects a of shape'),
        ('b', cut(2), 'expects b of shape')))]
SPECS += [
    replace(spec(wkv6, with_state(make6), NAMES6, 3, shapes=SHAPES_WITH_STATE,
                 wrong=(('initial_state', cut(3), 'expects initial_state of shape'),)),
            maps=('k', 'r', 'v', 'w', 'initial_state'), id='wkv6 with states'),
    replace(spec(wkv7, with_state(make7), NAMES7, 5, shapes=SHAPES_WITH_STATE,
                 wrong=(('initial_state', cut(2), 'expects initial_state of shape'),)),
            maps=('k', 'r', 'w', 'v', 'a', 'b', 'initial_state'), id='wkv7 with states')]
