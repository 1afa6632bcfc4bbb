import torch

from op_specs import Spec, randn
from vmamba_mm.ops import masa, masa_mixer
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.rotation import rotation_table


def make(*shape):
    return {name: randn(*shape, seed=i) for i, name in enumerate('qkv')}


def places(q, turned):
    """Decays, and cosines and sines of the places, which have no gradient."""
    height, width, heads, dim = q.shape[1:] if q.dim() == 5 else (1, 1, 1, 2)
    dtype = compute_dtype(q.dtype)
    decay = -torch.linspace(0.1, 1, heads, dtype=torch.float64)
    numbers = torch.arange(height * width).view(height, width)
    table = rotation_table(numbers, dim, torch.float64).to(q.device, dtype) if turned else None
    return decay.to(q.device, dtype), table


def spec(form, turned=True, **kwargs):
    def call(inputs, backend=None):
        decay, turns = places(inputs['q'], turned)
        return masa(**inputs, decay=decay, form=form, turns=turns)

    def count(shape):
        batch, height, width, heads, dim = shape
        seen = height * width if form == 'whole' else height + width
        return 4 * batch * height * width * heads * dim * seen

    # torch's attention, which runs elsewhere, is tested in test_masa.py.
    return Spec(
        'masa', id=f'masa {form}{"" if turned else " as it is"}', call=call, make=make,
        arguments=lambda inputs, out_dtype: (
            *inputs.values(), *places(inputs['q'], turned), form == 'whole'),
        maps=('q', 'k', 'v'), shapes=(), capability=80, takes_out_dtype=False, roundings=3,
        flops=count, **kwargs)


SPECS = [
    spec('decomposed', kernel_shapes=((2, 3, 5, 5, 16), (1, 17, 2, 2, 16), (1, 2, 40, 3, 32)),
         half_shapes=((2, 14, 5, 3, 32), (1, 3, 33, 1, 16))),
    spec('decomposed', turned=False, kernel_shapes=((2, 2, 3, 1, 32),),
         half_shapes=((1, 28, 4, 2, 16),)),
    spec('whole', kernel_shapes=((2, 3, 7, 2, 32), (1, 8, 8, 1, 16)),
         half_shapes=((2, 7, 7, 3, 32),))]


def make_mixer(*shape):
    dim = shape[3] * shape[4]
    inputs = dict(x=randn(*shape[:3], dim))
    for i, name in enumerate(('q', 'k', 'v', 'lepe', 'out')):
        size = (dim, 1, 5, 5) if name == 'lepe' else (dim, dim)
        inputs[f'{name}_weight'] = randn(*size, seed=i) / (5 if name == 'lepe' else dim ** 0.5)
        inputs[f'{name}_bias'] = randn(dim, seed=i + 1)
    return inputs


def mixer_spec(form, dim, **kwargs):
    def places_of(x):
        return places(x.unflatten(-1, (-1, dim)), True)

    def call(inputs, backend=None):
        pairs = {name: (inputs[f'{name}_weight'], inputs[f'{name}_bias'])
                 for name in ('q', 'k', 'v', 'lepe', 'out')}
        decay, turns = places_of(inputs['x'])
        return masa_mixer(inputs['x'], **pairs, decay=decay, turns=turns, form=form)

    def count(shape):
        batch, height, width, heads, _ = shape
        channels, pixels = heads * dim, batch * height * width
        seen = height * width if form == 'whole' else height + width
        return 2 * pixels * channels * (4 * channels + 25 + 2 * seen)

    return Spec('masa_mixer', id=f'masa_mixer {form}', call=call, make=make_mixer,
                arguments=lambda inputs, out_dtype: (
                    *inputs.values(), *places_of(inputs['x']), form == 'whole'),
                shapes=(), capability=80, takes_out_dtype=False, roundings=4, flops=count,
                **kwargs)


SPECS += [mixer_spec('decomposed', 16, kernel_shapes=((2, 3, 6, 2, 16), (1, 1, 17, 1, 16)),
                     half_shapes=((2, 5, 4, 2, 16),)),
          mixer_spec('whole', 32, kernel_shapes=((2, 4, 3, 1, 32),),
                     half_shapes=((2, 7, 3, 2, 32),))]
