"""The ops of the mixer of Mamba around its scan."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from op_specs import Spec, cut, randn
from vmamba_mm.ops import causal_conv, mamba_inner, selective_scan
from vmamba_mm.testing import mamba_inner_inputs

# --- causal_conv ----------------------------------------------------------------------------------

def make_conv(*shape):
    """Shapes are (batch, length, dim, taps)."""
    batch, length, dim, taps = shape
    return dict(x=randn(batch, length, dim), weight=randn(dim, taps, seed=2),
                bias=randn(dim, seed=3))


def make_conv_with_state(*shape):
    batch, _, dim, taps = shape
    return make_conv(*shape) | dict(initial_state=randn(batch, taps - 1, dim, seed=4))


def make_conv_bare(*shape):
    return {name: t for name, t in make_conv(*shape).items() if name != 'bias'}


def conv_spec(make, silu=True, reverse=False, final=False, **kwargs):
    return Spec(
        'causal_conv_fwd',
        call=lambda inputs, **options: causal_conv(
            inputs['x'], inputs['weight'], inputs.get('bias'), silu=silu, reverse=reverse,
            initial_state=inputs.get('initial_state'), return_final_state=final, **options),
        arguments=lambda inputs, out_dtype: (
            inputs['x'], inputs['weight'], inputs.get('bias'), inputs.get('initial_state'), silu,
            reverse, final),
        make=make, maps=('x', 'initial_state') if make is make_conv_with_state else ('x',),
        backends=('reference', 'chunked', 'cuda'), kernels=('cuda',), takes_out_dtype=False,
        flops=lambda shape: 2 * shape[0] * shape[1] * shape[2] * shape[3], **kwargs)


CONV = [
    conv_spec(
        make_conv,
        shapes=((2, 5, 3, 4), (1, 1, 1, 4), (2, 2, 3, 4), (1, 17, 6, 2), (2, 50, 8, 3),
                (1, 3, 2, 7), (1, 4, 2, 1)),
        kernel_shapes=((2, 5, 3, 4), (1, 1, 1, 4), (2, 19, 34, 2), (1, 9, 40, 3)),
        half_shapes=((2, 9, 40, 4), (2, 5, 3, 3)), gpu_shapes=((2, 197, 768, 4), (1, 1000, 50, 2)),
        wrong=(('weight', cut(0), r'expects x \(B, L, D\) and weight'),
               ('bias', cut(0), 'expects bias of shape'))),
    replace(conv_spec(
        make_conv_with_state, reverse=True, final=True,
        shapes=((2, 5, 3, 4), (1, 1, 1, 4), (2, 2, 3, 4), (1, 3, 2, 2)),
        kernel_shapes=((2, 5, 3, 4), (1, 1, 1, 4), (2, 2, 34, 4)),
        wrong=(('initial_state', cut(1), 'expects initial_state of shape'),)),
        id='causal_conv with states, reversed'),
    replace(conv_spec(
        make_conv_with_state, silu=False, final=True, shapes=((2, 6, 3, 4), (1, 2, 3, 4)),
        kernel_shapes=((2, 6, 3, 4),)),
        id='causal_conv with states, no SiLU'),
    replace(conv_spec(make_conv_bare, silu=False, reverse=True, shapes=((2, 6, 3, 3),)),
            id='causal_conv without bias, reversed')]


# --- mamba_inner ----------------------------------------------------------------------------------

NAMES = 'xz', 'conv_weight', 'conv_bias', 'x_proj', 'dt_proj', 'dt_bias', 'A', 'D'


def make_inner(*shape):
    """Shapes are (batch, directions, dim, length, state, rank, taps)."""
    return mamba_inner_inputs(*shape, dtype=torch.float64)


def make_inner_bare(*shape):
    return {name: t for name, t in make_inner(*shape).items() if name != 'conv_bias'}


def inner_flops(shape):
    batch, routes, dim, length, state, rank, taps = shape
    products = taps + (rank + 2 * state) + rank
    return 2 * batch * routes * dim * length * (products + 9 * state + 1)


def by_hand(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale):
    """What a user would write in half precision: the scan alone is in fp32."""
    total, (rank, state) = 0, (dt_proj.shape[2], A.shape[2])
    for k in range(len(A)):
        backwards = reverse or k == 1
        x, z = (xz.flip(1) if backwards else xz).transpose(1, 2).chunk(2, dim=1)
        weight, bias, by_x, by_dt = (None if t is None else t[k].to(x.dtype) for t in (
            conv_weight, conv_bias, x_proj, dt_proj))
        u = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        u = F.silu(u[..., :x.shape[2]])
        dt, B, C = (by_x @ u).split((rank, state, state), dim=1)
        y = selective_scan(u.float(), (by_dt @ dt).float(), A[k].float(), B[:, None].float(),
                           C[:, None].float(), D[k].float(), delta_bias=dt_bias[k].float(),
                           delta_softplus=True, backend='reference').to(x.dtype)
        y = (y * F.silu(z)).transpose(1, 2)
        total = total + (y.flip(1) if backwards else y)
    return total * scale


def inner_spec(reverse=False, scale=1.0, **kwargs):
    return Spec(
        'mamba_inner_fwd',
        call=lambda inputs, **options: mamba_inner(*map(inputs.get, NAMES), reverse=reverse,
                                                   scale=scale, **options),
        arguments=lambda inputs, out_dtype: (*map(inputs.get, NAMES), reverse, scale),
        maps=('xz',), backends=('reference', 'chunked', 'cuda', 'triton'),
        kernels=('cuda', 'triton'), takes_out_dtype=False, naive=by_hand, flops=inner_flops,
        **kwargs)


INNER = [
    inner_spec(
        scale=0.5, make=make_inner,
        shapes=((2, 2, 2, 5, 2, 1, 4), (1, 2, 1, 1, 1, 1, 4), (2, 2, 3, 2, 1, 2, 4),
                (1, 2, 6, 17, 16, 3, 4), (3, 2, 4, 50, 4, 2, 3)),
        kernel_shapes=((2, 2, 3, 11, 2, 1, 4), (1, 2, 1, 1, 1, 1, 4), (1, 2, 40, 20, 16, 3, 2)),
        half_shapes=((2, 2, 8, 15, 4, 4, 4),),
        interpreter_shapes=((2, 2, 2, 4, 1, 1, 3),), gpu_shapes=((2, 2, 200, 197, 16, 12, 4),),
        wrong=(('xz', cut(2), r'expects xz \(B, L, 4\)'),
               ('x_proj', cut(1), 'expects x_proj of shape'),
               ('D', cut(1), 'expects D of shape'),
               ('conv_weight', lambda t: t.repeat(2, 1, 1), 'K of 1 or 2 directions'),
               ('A', lambda A: A * 1j, 'complex'))),
    replace(inner_spec(make=make_inner_bare, shapes=((2, 1, 3, 7, 2, 2, 4), (1, 1, 2, 1, 2, 1, 2))),
            id='mamba_inner forward'),
    replace(inner_spec(reverse=True, make=make_inner, shapes=((2, 1, 3, 7, 2, 2, 4),),
                       kernel_shapes=((2, 1, 5, 9, 3, 2, 4),)),
            id='mamba_inner backward')]
SPECS = CONV + INNER
