import torch

from op_specs import Spec, randn
from op_specs.ss2d_scan import naive_norm
from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.vss_block import Weights, reference, vss_block, vss_blocks
from vmamba_mm.testing import ss2d_scan_inputs

EPS = 1e-5


def make(batch, height, width, dim, inner):
    """With 4 * dim hidden channels, R = 2 and N = 1."""
    scan = ss2d_scan_inputs(1, inner, 1, 1, dtype=torch.float64)
    norm1, norm2, out_norm = (randn(size, seed=i) / 2 + 1
                              for i, size in enumerate((dim, dim, inner)))
    weights = Weights(
        norm1=norm1, norm1_bias=randn(dim, seed=3), in_proj=randn(inner, dim) / dim**0.5,
        conv=randn(inner, 1, 3, 3) / 3, x_proj=scan['x_proj_weight'],
        dt_projs=scan['dt_projs_weight'], dt_bias=scan['dt_projs_bias'],
        A_logs=(-scan['A']).log(), D=scan['D'], out_norm=out_norm,
        out_norm_bias=randn(inner, seed=4), out_proj=randn(dim, inner) / inner**0.5, norm2=norm2,
        norm2_bias=randn(dim, seed=5), fc1=randn(4 * dim, dim) / dim**0.5, fc1_bias=randn(4 * dim),
        fc2=randn(dim, 4 * dim) / (4 * dim)**0.5, fc2_bias=randn(dim, seed=6),
        conv_bias=randn(inner, seed=7))
    return dict(x=randn(batch, height, width, dim), **weights._asdict())


def factors(x):
    return torch.linspace(0.5, 2, len(x), device=x.device), None


def product_dtype(x):
    return autocast_dtype(x) or x.dtype


def call(inputs, backend=None, out_dtype=None):
    x, *weights = inputs.values()
    return vss_block(x, Weights._make(weights), factors(x), EPS, product_dtype(x),
                     out_dtype or x.dtype)


def call_blocks(inputs, backend=None, out_dtype=None):
    x, *weights = inputs.values()
    return vss_blocks(x, [Weights._make(weights)] * 2, EPS, product_dtype(x), out_dtype or x.dtype)


def arguments(inputs, out_dtype):
    x, *weights = inputs.values()
    return (x, *weights, *factors(x), EPS, product_dtype(x), out_dtype)


def naive(x, *args):
    return reference.vss_block(x, Weights._make(args[:19]), *args[19:], scan_norm=naive_norm)


def naive_blocks(x, weights, has_conv_bias, eps, dtype, out_dtype):
    for _ in range(2):
        x = naive(x, *weights[:19], None, None, eps, dtype, x.dtype)
    return x


def flops(shape):
    batch, height, width, dim, inner = shape
    scan = 4 * inner * (2 + 2 + 2) + 4 * inner * 10
    return 2 * batch * height * width * (2 * inner * dim + 9 * inner + 8 * dim * dim + scan)


LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
SPECS = [
    Spec('vss_block_fwd', call=call, make=make, arguments=arguments, shapes=(),
         kernel_shapes=((2, 5, 6, 32, 32), (3, 1, 1, 32, 64)), half_shapes=((2, 7, 7, 32, 32),),
         gpu_shapes=((2, 14, 14, 96, 192),), naive=naive, flops=flops, limits=LIMITS, roundings=2),
    Spec('vss_block', id='vss_blocks', call=call_blocks, make=make,
         arguments=lambda inputs, out_dtype: (
             inputs['x'], [*inputs.values()][1:] * 2, True, EPS, product_dtype(inputs['x']),
             out_dtype),
         shapes=(), kernel_shapes=((2, 5, 6, 32, 32),), half_shapes=((2, 7, 7, 32, 32),),
         naive=naive_blocks, flops=lambda shape: 2 * flops(shape), limits=LIMITS,
         has_gradient=False, roundings=2)]
