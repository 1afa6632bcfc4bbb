"""What test_ops.py does not ask of dtypes: a residual sum beside its norm, and scan patterns."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from vmamba_mm.ops import add_norm, scan_norm
from vmamba_mm.testing import DEVICES, ss2d_scan_inputs

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DIM = 8
cases = pytest.mark.parametrize(
    ('device', 'dtype', 'out_dtype', 'casts'),
    list(itertools.product(DEVICES, (SINGLE, BRAIN), (None, SINGLE, BRAIN, HALF), (False, True))),
    ids=lambda value: str(value).removeprefix('torch.'))


def autocast(device, casts):
    return torch.autocast(device, BRAIN) if casts else nullcontext()


def make(device, dtype):
    torch.manual_seed(0)
    x, branch = torch.randn(2, 2, 3, 5, DIM, device=device).to(dtype)
    return x, branch, *torch.randn(2, DIM, device=device).to(dtype)


@cases
def test_sums(device, dtype, out_dtype, casts):
    x, branch, weight, bias = make(device, dtype)
    with autocast(device, casts):
        total, _ = add_norm(x, branch, weight, bias, out_dtype=out_dtype)
        wider, _ = add_norm(x, branch.float(), weight, bias)
    assert total.dtype == wider.dtype == dtype
    torch.testing.assert_close(total.double(), x.double() + branch.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [SINGLE, BRAIN], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('casts', [False, True])
@pytest.mark.parametrize('scan', ['cross', 'unidirectional', 'bidirectional', 'cascade'])
def test_patterns(device, dtype, casts, scan):
    images = ss2d_scan_inputs(1, 4, 3, 5, dtype=dtype, device=device)
    norm = dict(norm_weight=torch.ones(4, device=device), norm_bias=torch.zeros(4, device=device))
    with autocast(device, casts):
        assert scan_norm(**images, **norm, scan=scan).dtype == dtype
        plain = scan_norm(**images, norm_weight=None, norm_bias=None, scan=scan)
    assert plain.dtype == dtype and plain.shape == images['x'].shape
