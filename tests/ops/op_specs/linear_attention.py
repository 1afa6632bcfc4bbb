"""Linear attention with and without rotation and rank augmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from op_specs import Spec, cut, randn
from vmamba_mm.ops import linear_attention
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.rotation import rotate_pairs, rotation_table

EPS = 0.1  # with a single token, all gradients by queries and keys come from it


def make(batch, length, heads, dim, width):
    return {'q': randn(batch, length, heads, dim), 'k': randn(batch, length, heads, dim, seed=1),
            'v': randn(batch, length, heads, width, seed=2)}


def turns_of(q: Tensor, turned: bool) -> Tensor | None:
    """Cosines and sines of the places, which have no gradient."""
    if not turned:
        return None
    length, channels = (q.shape[1], q.shape[2] * q.shape[3]) if q.dim() == 4 else (1, 2)
    table = rotation_table(torch.arange(length), channels, torch.float64)
    return table.to(q.device, compute_dtype(q.dtype))


def by_hand(q, k, v, turns, augmented, eps) -> Tensor:
    """What a user would write in half precision: features and products in the half, sums in fp32.
    """
    f, g = F.elu(q) + 1, F.elu(k) + 1
    if augmented:
        scores = (f.mean(1, keepdim=True) * g).float().sum(-1, keepdim=True)
        weights = (scores * q.shape[3] ** -0.5).softmax(1)
    else:
        weights = 1 / q.shape[1]
    keys = g * weights
    z = 1 / ((f * keys.sum(1, keepdim=True)).sum(-1, keepdim=True) + eps)
    if turns is not None:
        f, keys = (rotate_pairs(t.flatten(2), turns).view(q.shape) for t in (f, keys))
    state = keys.to(v.dtype).permute(0, 2, 3, 1) @ v.transpose(1, 2)
    y = (f.to(v.dtype).transpose(1, 2) @ state.to(v.dtype)).transpose(1, 2)
    return (y * z).to(v.dtype)


def spec(augmented, turned, **kwargs):
    return Spec(
        'linear_attention_fwd',
        call=lambda inputs, **options: linear_attention(
            **inputs, turns=turns_of(inputs['q'], turned), augmented=augmented, eps=EPS, **options),
        arguments=lambda inputs, out_dtype: (
            *inputs.values(), turns_of(inputs['q'], turned), augmented, EPS),
        make=make, maps=('q', 'k', 'v'), backends=('reference', 'chunked', 'triton'),
        kernels=('triton',),
        takes_out_dtype=False, naive=by_hand, roundings=3,
        flops=lambda shape: 2 * shape[0] * shape[1] * shape[2] * shape[3] * (
            2 * shape[4] + 1 + augmented), **kwargs)


SPECS = [
    spec(augmented=True, turned=True,
         shapes=((2, 5, 2, 4, 4), (1, 1, 1, 2, 1), (2, 3, 2, 3, 5), (1, 50, 3, 8, 8)),
         interpreter_shapes=((2, 5, 2, 4, 4), (1, 1, 1, 2, 1), (1, 130, 2, 24, 20)),
         half_shapes=((2, 70, 2, 16, 16), (1, 300, 3, 32, 32)),
         gpu_shapes=((2, 3136, 1, 64, 64), (3, 300, 2, 96, 96), (2, 49, 4, 128, 128),
                     (2, 3, 2, 4, 5)),
         wrong=(('q', lambda q: q[0], r'linear_attention expects q \(B, L, n, P\)'),
                ('k', cut(3), 'expects k of shape'), ('v', cut(1), 'expects v of shape'),
                ('v', torch.Tensor.half, 'of one real dtype'))),
    spec(augmented=False, turned=True, shapes=((2, 6, 2, 3, 2), (1, 40, 1, 16, 16)),
         interpreter_shapes=((1, 130, 2, 8, 8),), half_shapes=((2, 70, 2, 32, 32),),
         gpu_shapes=((2, 3136, 2, 32, 32), (2, 49, 16, 32, 32)),
         id='linear_attention of equal weights'),
    spec(augmented=False, turned=False, shapes=((2, 4, 1, 3, 3),),
         interpreter_shapes=((2, 4, 1, 3, 3),), gpu_shapes=((2, 200, 2, 16, 32),),
         id='linear_attention without rotation')]
