from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from op_specs import Spec, cut, randn
from vmamba_mm.ops import nc_ssd, nc_ssd_mixer, nc_ssd_norm

NAMES = 'x', 'dt', 'A', 'B', 'C', 'D'


def make(*shape):
    """Shapes are (batch, length, heads, channels of a head, groups, state)."""
    batch, length, heads, dim, groups, state = shape
    return dict(x=randn(batch, length, heads, dim), dt=randn(batch, length, heads),
                A=-randn(heads).exp(), B=randn(batch, length, groups, state, seed=1),
                C=randn(batch, length, groups, state, seed=2), D=randn(heads, seed=1),
                dt_bias=randn(heads, seed=2))


def make_bare(*shape):
    """With weights of the tokens that are given, and no D."""
    return {name: t for name, t in make(*shape).items() if name not in ('D', 'dt_bias')}


def by_hand(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> Tensor:
    """What a user would write in half precision: products in the half, weights in fp32."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    weights = dt * A.float() * (-1 if positive else 1)
    heads = [h % B.shape[2] for h in range(x.shape[2])]
    B, C = B[:, :, heads].movedim(2, 1), C[:, :, heads].movedim(2, 1)  # (B, H, L, N)
    values = (x * weights[..., None]).to(x.dtype).movedim(2, 1)
    y = (C @ (B.mT @ values)).movedim(1, 2)
    return y if D is None else (y + x * D.to(x.dtype)[:, None]).to(x.dtype)


def spec(make, softplus=True, positive=True, **kwargs):
    return Spec(
        'nc_ssd_fwd',
        call=lambda inputs, **options: nc_ssd(
            *map(inputs.get, NAMES), dt_bias=inputs.get('dt_bias'), dt_softplus=softplus,
            positive=positive, **options),
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, NAMES), inputs.get('dt_bias'), softplus, positive),
        make=make, maps=('x', 'dt', 'B', 'C'), backends=('reference', 'chunked', 'cuda'),
        capability=80, takes_out_dtype=False, naive=by_hand,
        flops=lambda shape: 4 * shape[0] * shape[1] * shape[2] * shape[3] * shape[5], **kwargs)


def make_norm(*shape):
    batch, length, heads, dim = shape[:4]
    return make(*shape) | dict(z=randn(batch, length, heads * dim),
                               norm_weight=randn(heads * dim, seed=1),
                               norm_bias=randn(heads * dim, seed=2))


def norm_by_hand(*args):
    *args, z, weight, bias, softplus, positive, eps = args
    y = by_hand(*args, softplus, positive).flatten(2)
    return (F.layer_norm(y.float(), weight.shape, weight.float(), bias.float(), eps).to(y.dtype)
            * z)


def norm_spec(make, positive=True, **kwargs):
    return Spec(
        'nc_ssd_norm_fwd',
        call=lambda inputs, backend=None: nc_ssd_norm(
            *map(inputs.get, NAMES), **{k: t for k, t in inputs.items() if k not in NAMES},
            eps=1e-3, dt_softplus=True, positive=positive),
        arguments=lambda inputs, out_dtype: (
            *map(inputs.get, NAMES), inputs.get('dt_bias'), inputs['z'], inputs['norm_weight'],
            inputs['norm_bias'], True, positive, 1e-3),
        make=make, maps=('x', 'dt', 'B', 'C', 'z'), capability=80, takes_out_dtype=False,
        naive=norm_by_hand, roundings=4,
        flops=lambda shape: 4 * shape[0] * shape[1] * shape[2] * shape[3] * shape[5], **kwargs)


MIXER = ('projected', 'conv_weight', 'conv_bias', 'A', 'D', 'dt_bias', 'norm_weight', 'norm_bias')


def make_mixer(*shape):
    """Shapes are (batch, height, width, heads, channels of a head, groups, state); rows of the
    projection end with numbers that nobody reads, so that they have multiples of 8."""
    batch, height, width, heads, dim, groups, state = shape
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    size = -(-(inner + channels + heads) // 8) * 8
    inputs = dict(projected=randn(batch, height, width, size),
                  conv_weight=randn(channels, 1, 3, 3) / 3, conv_bias=randn(channels, seed=1),
                  A=-randn(heads).exp(), D=randn(heads, seed=1), dt_bias=randn(heads, seed=2),
                  norm_weight=randn(inner, seed=1), norm_bias=randn(inner, seed=2))
    return inputs


def mixer_by_hand(*args):
    projected, conv_weight, conv_bias, A, D, dt_bias, weight, bias, groups, positive, eps = args
    inner, heads, channels = len(weight), len(A), len(conv_weight)
    z, xBC, dt = projected[..., :inner + channels + heads].split((inner, channels, heads), dim=-1)
    xBC = F.silu(F.conv2d(xBC.movedim(3, 1), conv_weight, conv_bias, padding=1, groups=channels))
    states = (channels - inner) // 2
    x, B, C = xBC.movedim(1, 3).flatten(1, 2).split((inner, states, states), dim=-1)
    y = by_hand(x.unflatten(-1, (heads, -1)), dt.flatten(1, 2), A,
                *(t.unflatten(-1, (groups, -1)) for t in (B, C)), D, dt_bias, True, positive)
    y = F.layer_norm(y.flatten(2).float(), weight.shape, weight.float(), bias.float(), eps)
    return y.to(projected.dtype).view(z.shape) * z


def mixer_spec(groups=1, **kwargs):
    return Spec(
        'nc_ssd_mixer',
        call=lambda inputs, backend=None: nc_ssd_mixer(
            *map(inputs.get, MIXER), groups=groups, eps=1e-3),
        arguments=lambda inputs, out_dtype: (*map(inputs.get, MIXER), groups, True, 1e-3),
        make=make_mixer, maps=('projected',), capability=80, takes_out_dtype=False,
        naive=mixer_by_hand, roundings=5,
        flops=lambda shape: shape[0] * shape[1] * shape[2] * (
            18 * (shape[3] * shape[4] + 2 * shape[5] * shape[6])
            + 4 * shape[3] * shape[4] * shape[6]), **kwargs)


SPECS = [
    spec(make, shapes=((2, 5, 2, 3, 1, 2), (1, 1, 1, 1, 1, 1), (1, 2, 4, 2, 2, 3),
                       (2, 50, 2, 16, 1, 8), (3, 17, 3, 5, 3, 4)),
         kernel_shapes=((2, 21, 2, 8, 1, 16), (1, 1, 1, 16, 1, 8), (2, 150, 4, 40, 2, 48),
                        (1, 330, 3, 24, 1, 64)),
         half_shapes=((2, 70, 2, 64, 1, 64), (1, 200, 4, 16, 2, 24)),
         gpu_shapes=((3, 3136, 2, 64, 1, 64), (2, 784, 4, 64, 1, 64), (5, 196, 8, 64, 1, 64),
                     (2, 196, 8, 48, 1, 48), (1, 20000, 12, 64, 1, 64), (2, 300, 6, 64, 3, 128)),
         wrong=(('x', lambda x: x[0], r'nc_ssd expects x \(B, L, H, P\)'),
                ('B', lambda B: B.repeat(1, 1, 3, 1), 'G a divisor of H'),
                ('C', cut(3), 'expects C of shape'), ('dt', cut(1), 'expects dt of shape'),
                ('A', cut(0), 'expects A of shape'), ('dt_bias', cut(0), 'dt_bias of shape'),
                ('B', torch.Tensor.half, 'of one real dtype'))),
    replace(spec(make_bare, softplus=False, positive=False,
                 shapes=((2, 6, 2, 2, 2, 3), (1, 9, 4, 4, 1, 5), (2, 9, 6, 4, 3, 5)),
                 kernel_shapes=((2, 70, 6, 8, 3, 128),), half_shapes=((2, 100, 2, 32, 1, 32),),
                 gpu_shapes=((2, 300, 4, 64, 2, 64),)),
            id='nc_ssd of given weights'),
    norm_spec(make_norm, shapes=((2, 12, 2, 4, 1, 4), (1, 1, 2, 3, 1, 1), (2, 7, 4, 2, 2, 3)),
              kernel_shapes=((2, 21, 2, 8, 1, 16), (1, 3, 2, 16, 1, 8), (2, 150, 4, 40, 1, 48)),
              half_shapes=((2, 70, 2, 64, 1, 64), (1, 200, 4, 16, 1, 24)),
              gpu_shapes=((3, 3136, 2, 64, 1, 64), (2, 784, 4, 64, 1, 64), (5, 196, 8, 64, 1, 64),
                          (2, 196, 8, 48, 1, 48), (2, 300, 12, 64, 1, 64),
                          (16, 1300, 12, 64, 1, 64)),
              wrong=(('z', cut(2), 'nc_ssd_norm expects z'),
                     ('norm_bias', cut(0), 'nc_ssd_norm expects z'),
                     ('C', cut(3), 'expects C of shape'))),
    replace(norm_spec(lambda *shape: {k: t for k, t in make_norm(*shape).items()
                                      if k not in ('D', 'dt_bias')}, positive=False,
                      shapes=((2, 6, 2, 4, 1, 3),), kernel_shapes=((2, 70, 6, 8, 1, 128),),
                      half_shapes=((2, 100, 2, 32, 1, 32),)),
            id='nc_ssd_norm without D and bias'),
    mixer_spec(shapes=((2, 3, 4, 2, 4, 1, 4), (1, 2, 1, 2, 3, 1, 1)),
               kernel_shapes=((2, 3, 5, 2, 8, 1, 16), (1, 9, 17, 3, 24, 1, 40)),
               half_shapes=((2, 9, 7, 2, 64, 1, 64),),
               gpu_shapes=((3, 56, 56, 2, 64, 1, 64), (2, 13, 14, 8, 64, 1, 64)),
               wrong=(('projected', lambda t: t[..., :9], 'nc_ssd_mixer expects projected'),
                      ('norm_weight', cut(0), 'nc_ssd_mixer expects'))),
    replace(mixer_spec(groups=2, shapes=((2, 3, 3, 2, 4, 2, 4),)), kernels=(),
            id='nc_ssd_mixer of two groups')]
