"""Every dtype argument of an op is obeyed on every device, with and without autocast."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from vmamba_mm.ops import (
    add_norm,
    conv_norm,
    dwconv_silu,
    layer_norm,
    scan_norm,
    selective_scan,
    ss2d_scan,
)
from vmamba_mm.testing import DEVICES, selective_scan_inputs, ss2d_scan_inputs

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
def test_norms(device, dtype, out_dtype, casts):
    x, branch, weight, bias = make(device, dtype)
    default = SINGLE if casts else dtype
    exact = torch.nn.functional.layer_norm(x.double(), (DIM,), weight.double(), bias.double())
    with autocast(device, casts):
        y = layer_norm(x, weight, bias, out_dtype=out_dtype)
        total, normed = add_norm(x, branch, weight, bias, out_dtype=out_dtype)
        alone, _ = add_norm(x, branch, None, None, out_dtype=out_dtype)
        wider, _ = add_norm(x, branch.float(), weight, bias)
    assert y.dtype == normed.dtype == (out_dtype or default)
    assert total.dtype == wider.dtype == dtype and alone.dtype == (out_dtype or dtype)
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(alone.double(), x.double() + branch.double(), rtol=0.02, atol=0.02)


@cases
def test_convolutions(device, dtype, out_dtype, casts):
    x, _, weight, bias = make(device, dtype)
    kernel = torch.randn(DIM, DIM, 3, 3, device=device).to(dtype)
    with autocast(device, casts):
        y = conv_norm(x, kernel, bias, weight, bias, stride=2, padding=1, out_dtype=out_dtype)
        z = dwconv_silu(x, kernel[:, :1].contiguous(), bias)
    assert y.dtype == (out_dtype or (SINGLE if casts else dtype)) and y.isfinite().all()
    assert z.dtype == dtype


@cases
def test_scans(device, dtype, out_dtype, casts):
    inputs = selective_scan_inputs(1, 2, 4, 6, 1, dtype=dtype, device=device)
    images = ss2d_scan_inputs(1, 4, 3, 5, dtype=dtype, device=device)
    norm = dict(norm_weight=torch.ones(4, device=device), norm_bias=torch.zeros(4, device=device))
    with autocast(device, casts):
        assert selective_scan(**inputs, out_dtype=out_dtype).dtype == (out_dtype or dtype)
        assert ss2d_scan(**images, out_dtype=out_dtype).dtype == (out_dtype or dtype)
        for scan in ('cross', 'unidirectional', 'bidirectional', 'cascade'):
            assert scan_norm(**images, **norm, scan=scan).dtype == dtype
            plain = scan_norm(**images, norm_weight=None, norm_bias=None, scan=scan)
            assert plain.dtype == dtype and plain.shape == images['x'].shape
