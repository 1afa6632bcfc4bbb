import torch

from op_specs import Spec, cut
from op_specs.ss2d_scan import flops
from vmamba_mm.ops import ordered_scan, selective_scan
from vmamba_mm.ops.ss2d_scan import ordered
from vmamba_mm.testing import ss2d_scan_inputs

WRAPPED, UNWRAPPED = ordered.PATTERNS


def make(batch, dim, height, width, state, routes, rank):
    return ss2d_scan_inputs(batch, dim, height, width, state=state, routes=routes, rank=rank,
                            dtype=torch.float64)


def naive(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan, out_dtype):
    """Plain PyTorch under autocast: projections in half precision, the scan in fp32."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    orders = torch.stack([r.positions(*x.shape[2:]) for r in ordered.PATTERNS[scan]]).to(x.device)
    x_BKDL = x.flatten(2)[:, :, orders].transpose(1, 2)
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight.to(x.dtype))
    dt, B, C = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_projs_weight.to(x.dtype))
    y = selective_scan(x_BKDL.flatten(1, 2).float(), delta.flatten(1, 2).float(), A.float(),
                       B.float(), C.float(), D.float(), delta_bias=dt_projs_bias.flatten().float(),
                       delta_softplus=True, backend='chunked').view_as(x_BKDL)
    y = y.gather(3, orders.argsort(1)[:, None].expand_as(y)).sum(1)
    return y.unflatten(2, x.shape[2:]).to(out_dtype)


def spec(scan, **kwargs):
    return Spec('ordered_scan_fwd', id=f'ordered_scan-{scan}',
                call=lambda inputs, **options: ordered_scan(**inputs, scan=scan, **options),
                make=make,
                arguments=lambda inputs, out_dtype: (*inputs.values(), scan, out_dtype),
                backends=('reference', 'chunked', 'cuda', 'triton'), kernels=('cuda', 'triton'),
                naive=naive, flops=flops, **kwargs)


SPECS = [
    spec(WRAPPED,
         shapes=((2, 2, 2, 3, 2, 8, 2), (1, 1, 1, 1, 1, 8, 2), (1, 3, 7, 2, 4, 8, 2),
                 (2, 3, 1, 9, 1, 8, 2), (1, 3, 9, 1, 16, 8, 1)),
         kernel_shapes=((2, 20, 3, 4, 16, 8, 2), (1, 33, 9, 2, 1, 8, 1), (1, 12, 1, 5, 4, 8, 3)),
         half_shapes=((2, 32, 5, 7, 16, 8, 2), (2, 20, 7, 3, 1, 8, 2)),
         interpreter_shapes=((2, 3, 3, 4, 1, 8, 2),),
         gpu_shapes=((2, 192, 64, 64, 16, 8, 6), (1, 100, 37, 53, 4, 8, 9),
                     (3, 96, 56, 56, 1, 8, 6), (1, 20, 9, 11, 64, 8, 2)),
         wrong=(('D', cut(0), 'expects D of shape'), ('A', lambda A: A[0], 'expects x'),
                ('x_proj_weight', cut(0), 'K = 8 routes'),
                ('dt_projs_weight', cut(0), 'K = 8 routes'))),
    spec(UNWRAPPED, shapes=((2, 2, 2, 3, 1, 8, 2),), kernel_shapes=((2, 12, 4, 3, 4, 8, 1),))]
