import torch

from op_specs import Spec, cut, randn
from vmamba_mm.ops import cross_merge, cross_scan, selective_scan, ss2d_scan, ss2d_scan_norm
from vmamba_mm.testing import ss2d_scan_inputs

NAMES = 'x', 'x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A', 'D'


def make(batch, dim, height, width, state, routes, rank):
    return ss2d_scan_inputs(batch, dim, height, width, state=state, routes=routes, rank=rank,
                            dtype=torch.float64)


def make_norm(*shape):
    dim = shape[1]
    return make(*shape) | dict(norm_weight=randn(dim, seed=1), norm_bias=randn(dim, seed=2))


def naive(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype):
    """Plain PyTorch under autocast: projections in half precision, the scan in fp32."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    x_BKDL = cross_scan(x, len(x_proj_weight))
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight.to(x.dtype))
    dt, B, C = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_projs_weight.to(x.dtype))
    y = selective_scan(x_BKDL.flatten(1, 2).float(), delta.flatten(1, 2).float(), A.float(),
                       B.float(), C.float(), D.float(), delta_bias=dt_projs_bias.flatten().float(),
                       delta_softplus=True, backend='chunked')
    return cross_merge(y.view_as(x_BKDL), *x.shape[2:]).to(out_dtype)


def naive_norm(*args):
    *inputs, weight, bias, eps = args
    y = naive(*inputs, torch.float32).permute(0, 2, 3, 1)
    y = torch.nn.functional.layer_norm(y, weight.shape, weight.float(), bias.float(), eps)
    return y.permute(0, 3, 1, 2).to(args[0].dtype)


def flops(shape):
    batch, dim, height, width, state, routes, rank = shape
    length = height * width
    projections = routes * length * dim * (rank + 2 * state + rank)
    return 2 * batch * (projections + length * routes * dim * (9 * state + 1))


# The ablations' three routes do not exist; K is 1, 2 or 4.
WRONG = (('D', cut(0), 'expects D of shape'), ('A', lambda A: A[0], 'expects x'),
         ('x_proj_weight', cut(1), 'expects x_proj_weight of shape'),
         ('dt_projs_weight', cut(0), 'K of 1, 2 or 4'),
         ('x', lambda x: x[:, :, :0], 'H and W of at least 1'))
SPECS = [
    Spec('ss2d_scan_fwd',
         call=lambda inputs, **options: ss2d_scan(**inputs, **options),
         make=make,
         arguments=lambda inputs, out_dtype: (*inputs.values(), out_dtype),
         shapes=((2, 2, 2, 3, 2, 4, 2), (1, 1, 1, 1, 1, 4, 2), (2, 3, 1, 40, 4, 4, 2),
                 (1, 3, 37, 1, 16, 4, 2), (3, 5, 7, 7, 1, 4, 2), (1, 4, 5, 9, 16, 4, 2),
                 (2, 2, 17, 4, 1, 4, 2), (2, 3, 4, 6, 1, 1, 3), (2, 3, 4, 6, 1, 2, 3)),
         kernel_shapes=((2, 3, 3, 4, 1, 4, 2), (1, 32, 1, 1, 1, 4, 2), (3, 20, 1, 10, 4, 4, 1),
                        (1, 33, 7, 1, 16, 2, 3), (1, 35, 2, 2, 1, 4, 18)),
         interpreter_shapes=((2, 3, 3, 4, 1, 4, 2), (1, 5, 4, 5, 3, 4, 3), (1, 2, 1, 11, 16, 2, 1),
                             (2, 3, 9, 1, 1, 1, 2), (1, 1, 1, 1, 1, 4, 2), (1, 35, 2, 2, 1, 4, 2),
                             (1, 2, 2, 3, 1, 4, 18)),
         half_shapes=((2, 32, 5, 7, 1, 4, 2), (2, 20, 3, 5, 4, 4, 2)),
         gpu_shapes=((3, 96, 56, 56, 1, 4, 6), (1, 96, 200, 336, 1, 4, 6),
                     (1, 100, 37, 53, 4, 4, 9), (2, 192, 28, 28, 16, 4, 12),
                     (1, 20, 9, 11, 64, 2, 2), (40, 768, 7, 7, 1, 4, 48), (2, 5, 1, 40, 1, 1, 2)),
         backends=('reference', 'chunked', 'cuda', 'triton'), kernels=('cuda', 'triton'),
         naive=naive, flops=flops, wrong=WRONG),
    Spec('ss2d_scan_norm',
         call=lambda inputs, **options: ss2d_scan_norm(**inputs, **options),
         make=make_norm,
         arguments=lambda inputs, out_dtype: (*inputs.values(), 1e-5),
         shapes=((2, 3, 2, 3, 1, 4, 2), (1, 6, 5, 4, 1, 4, 2)),
         kernel_shapes=((2, 20, 5, 7, 1, 4, 2), (2, 18, 3, 4, 1, 4, 2)),
         half_shapes=((2, 32, 5, 7, 1, 4, 2),),
         gpu_shapes=((2, 96, 9, 14, 1, 4, 6), (2, 1536, 9, 14, 1, 4, 6)),
         backends=('chunked', 'cuda'), takes_out_dtype=False, naive=naive_norm, flops=flops,
         limits={torch.float64: 1e-11, torch.float32: 2e-5}, wrong=WRONG[:1])]
