from op_specs import Spec, randn
from vmamba_mm.ops import cross_merge, cross_scan
from vmamba_mm.ops.core.define_op import OPS

SPECS = [
    Spec('cross_scan',
         call=lambda inputs, **options: cross_scan(inputs['x'], 3),
         make=lambda *shape: dict(x=randn(*shape)),
         arguments=lambda inputs, out_dtype: (inputs['x'], 3),
         shapes=((2, 3, 3, 4), (1, 1, 1, 1), (2, 1, 1, 5), (1, 2, 6, 1)), kernels=(),
         takes_out_dtype=False,
         wrong=(('x', lambda x: x[0], r'\(B, D, H, W\)'),)),
    Spec('cross_merge',
         call=lambda inputs, **options: cross_merge(inputs['y'], 3, 4),
         make=lambda *shape: dict(y=randn(*shape)),
         arguments=lambda inputs, out_dtype: (inputs['y'], 3, 4),
         shapes=((2, 4, 3, 12), (1, 1, 1, 12), (3, 3, 2, 12)), kernels=(), takes_out_dtype=False,
         maps=('y',),
         wrong=(('y', lambda y: y[..., :6], 'is not height'),
                ('y', lambda y: y[0], 'with K of 1'))),
    Spec('reorder',
         call=lambda inputs, **options: OPS['reorder'].call(
             inputs['x'], 3, 4, 'column-major', True),
         make=lambda *shape: dict(x=randn(*shape)),
         arguments=lambda inputs, out_dtype: (inputs['x'], 3, 4, 'column-major', True),
         shapes=((2, 12, 3), (1, 12, 1)), kernels=(), takes_out_dtype=False)]
