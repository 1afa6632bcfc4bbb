from op_specs import Spec, cut, randn
from vmamba_mm.ops import shift_mix, sigmoid_gate, squared_relu

NAMES = 'first', 'second', 'third'


def make_mixtures(count):
    return lambda *shape: dict(x=randn(*shape), **{
        name: randn(shape[3], seed=i) for i, name in enumerate(NAMES[:count])})


def mix_spec(count, pixels, share, heads, **kwargs):
    def call(inputs, backend=None, **options):
        x, *shares = inputs.values()
        return shift_mix(x, shares, pixels, share, head_dim=x.shape[-1] // heads, **options)

    def arguments(inputs, out_dtype):
        shares = (*map(inputs.get, NAMES),)
        return (inputs['x'], *shares, pixels, share, inputs['x'].shape[-1] // heads, out_dtype)

    return Spec('shift_mix', id=f'shift_mix {count}', call=call, make=make_mixtures(count),
                arguments=arguments, **kwargs)


def make_two(*shape):
    return dict(x=randn(*shape), other=randn(*shape, seed=1))


SPECS = [
    mix_spec(3, 1, 0.25, 1, shapes=((2, 3, 2, 4), (1, 1, 1, 9), (2, 2, 5, 7)),
             kernel_shapes=((2, 3, 5, 16), (1, 1, 4, 48), (2, 6, 2, 264)),
             half_shapes=((2, 7, 5, 32), (1, 3, 1, 384)),
             wrong=(('first', cut(0), r'shift_mix expects x \(B, H, W, C\)'),
                    ('x', lambda x: x[0], 'shift_mix expects x'))),
    mix_spec(2, 2, 0.125, 2, shapes=((2, 3, 4, 32),), kernel_shapes=((2, 4, 3, 64),),
             half_shapes=((2, 5, 7, 64),)),
    Spec('squared_relu',
         call=lambda inputs, backend=None: squared_relu(**inputs),
         make=lambda *shape: dict(x=randn(*shape)),
         arguments=lambda inputs, out_dtype: tuple(inputs.values()),
         shapes=((2, 3), (2, 3, 5, 7)), kernel_shapes=((2, 4), (3, 5, 4100)),
         half_shapes=((2, 3, 5, 24),), takes_out_dtype=False),
    Spec('sigmoid_gate',
         call=lambda inputs, backend=None: sigmoid_gate(**inputs),
         make=make_two,
         arguments=lambda inputs, out_dtype: tuple(inputs.values()),
         shapes=((2, 3), (2, 3, 5, 7)), kernel_shapes=((2, 4), (3, 5, 4100)),
         half_shapes=((2, 3, 5, 24),), maps=('x', 'other'), takes_out_dtype=False,
         wrong=(('other', cut(1), 'two maps of one shape'),))]
