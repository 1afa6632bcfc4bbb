from dataclasses import replace

import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import retention

NAMES = 'q', 'k', 'v', 'log_decay', 'initial_state'


def make(*shape):
    """Shapes are (batch, length, heads, channels of keys, channels of values)."""
    batch, length, heads, dim, value_dim = shape
    return dict(q=randn(batch, length, heads, dim), k=randn(batch, length, heads, dim, seed=1),
                v=randn(batch, length, heads, value_dim, seed=2),
                log_decay=-randn(heads, seed=3).abs() - 0.01)


def make_stateful(*shape):
    batch, _, heads, dim, value_dim = shape
    return make(*shape) | dict(initial_state=randn(batch, heads, value_dim, dim, seed=4))


def spec(make, final=False, **kwargs):
    def call(inputs, **options):
        found = retention(*map(inputs.get, NAMES[:4]), initial_state=inputs.get('initial_state'),
                          return_final_state=final, **options)
        # In the dtype of the result, which generic tests look at.
        return (found[0], found[1].to(found[0].dtype)) if final else found

    return Spec(
        'retention_fwd', call=call,
        arguments=lambda inputs, out_dtype: (*map(inputs.get, NAMES), final), make=make,
        maps=('v', 'q', 'k') + (('initial_state',) if final else ()),
        # A GPU multiplies in half precision: v, and scores.
        roundings=2, backends=('reference', 'chunked'), kernels=(), takes_out_dtype=False,
        flops=lambda shape: 6 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4], **kwargs)


SPECS = [
    spec(make, shapes=((2, 5, 2, 3, 2), (1, 1, 1, 1, 1), (1, 17, 3, 4, 8), (2, 70, 2, 16, 5)),
         wrong=(('q', lambda q: q[0], r'expects q and k \(B, L, H, N\)'),
                ('k', cut(3), r'expects q and k \(B, L, H, N\)'),
                ('v', cut(1), r'v \(B, L, H, P\)'),
                ('log_decay', cut(0), 'expects log_decay of shape'),
                ('k', torch.Tensor.half, 'of one real dtype'))),
    replace(spec(make_stateful, final=True, shapes=((2, 5, 2, 3, 2), (1, 130, 2, 4, 3)),
                 wrong=(('initial_state', cut(3), 'expects a state of shape'),)),
            id='retention with states')]
