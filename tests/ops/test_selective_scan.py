from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from vmamba_mm.ops import selective_scan
from vmamba_mm.ops.selective_scan import reference
from vmamba_mm.testing import (
    DEVICES,
    assert_close,
    relative_error,
    selective_scan_inputs,
    with_grads,
)

PARITY = Path(__file__).parents[3] / 'shared' / 'parity' / 'selective_scan.pt'
# (batch, groups, dim, length, state)
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 2, 1), (1, 4, 5, 37, 1), (3, 2, 4, 50, 4), (2, 3, 2, 65, 16),
          (1, 4, 2, 300, 2)]


def ids(shape):
    return 'B{}-K{}-D{}-L{}-N{}'.format(*shape)


def autograd_reference(u, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False):
    """The specification differentiated by autograd: no code of the op's own backward."""
    return reference.forward(u, delta, A, B, C, D, delta_bias, delta_softplus, u.dtype)


@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('shape', SHAPES, ids=ids)
@pytest.mark.parametrize('device', DEVICES)
def test_outputs_and_every_gradient(device, shape, backend, softplus):
    inputs = selective_scan_inputs(*shape, dtype=torch.float64, device=device)
    if not softplus:
        inputs['delta'], inputs['delta_bias'] = inputs['delta'].abs(), inputs['delta_bias'].abs()
    expected = with_grads(autograd_reference, inputs, delta_softplus=softplus)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        cast = {name: t.to(dtype) for name, t in inputs.items()}
        y, grads = with_grads(selective_scan, cast, delta_softplus=softplus, backend=backend)
        assert y.dtype == dtype
        assert_close(y, expected[0], rtol, 'y')
        for name, grad in grads.items():
            assert_close(grad, expected[1][name], rtol, f'gradient by {name}')


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_gradcheck(backend):
    inputs = [t.requires_grad_() for t in
              selective_scan_inputs(2, 2, 2, 5, 2, dtype=torch.float64).values()]

    def op(u, delta, A, B, C, D, bias):
        return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True,
                              backend=backend)
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize('backend', ['chunked'])
@pytest.mark.parametrize('optional', [True, False], ids=['all', 'no-D-no-bias'])
@pytest.mark.parametrize('device', DEVICES)
def test_opcheck(device, backend, optional):
    inputs = [t.requires_grad_()
              for t in selective_scan_inputs(2, 2, 3, 6, 2, device=device).values()]
    if not optional:
        inputs[5:] = [None, None]
    opcheck(torch.ops.vmamba_mm.selective_scan_fwd.default,
            (*inputs, True, torch.float32, backend))
    inputs = [None if t is None else t.detach() for t in inputs]
    opcheck(torch.ops.vmamba_mm.selective_scan_bwd.default,
            (torch.ones_like(inputs[0]), *inputs, True, backend))


def test_skip_and_bias_are_optional():
    inputs = selective_scan_inputs(2, 2, 3, 9, 2, dtype=torch.float64)
    zeros = dict(inputs, D=torch.zeros_like(inputs['D']),
                 delta_bias=torch.zeros_like(inputs['delta_bias']))
    bare = {name: inputs[name] for name in ('u', 'delta', 'A', 'B', 'C')}
    y, grads = with_grads(selective_scan, bare, delta_softplus=True)
    y_zeros, grads_zeros = with_grads(selective_scan, zeros, delta_softplus=True)
    assert_close(y, y_zeros, 1e-14)
    for name, grad in grads.items():
        assert_close(grad, grads_zeros[name], 1e-14, name)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision_is_no_worse_than_naive(dtype):
    """Inputs and results are rounded to half; in between everything is fp32."""
    inputs = {name: t.to(dtype) for name, t in selective_scan_inputs(2, 4, 5, 99, 4).items()}
    exact, exact_grads = with_grads(
        autograd_reference, {name: t.double() for name, t in inputs.items()}, delta_softplus=True)
    naive, naive_grads = with_grads(selective_scan, inputs, delta_softplus=True,
                                    backend='reference')
    y, grads = with_grads(selective_scan, inputs, delta_softplus=True)
    assert y.dtype == dtype
    assert relative_error(y, exact) <= 2 * relative_error(naive, exact)
    for name in inputs:
        assert grads[name].dtype == dtype
        limit = 2 * relative_error(naive_grads[name], exact_grads[name])
        assert relative_error(grads[name], exact_grads[name]) <= limit, name
    y32 = selective_scan(**inputs, delta_softplus=True, out_dtype=torch.float32)
    assert y32.dtype == torch.float32
    assert_close(y32, exact, 1e-5)


@pytest.mark.parametrize('value', [-1e4, -30.0, 0.0, 20.0, 1e3, 6e4])
def test_extreme_delta_is_finite_and_right(value):
    inputs = selective_scan_inputs(1, 2, 3, 41, 3, dtype=torch.float64)
    inputs['delta'] = torch.full_like(inputs['delta'], value)
    expected, expected_grads = with_grads(autograd_reference, inputs, delta_softplus=True)
    single = {name: t.float() for name, t in inputs.items()}
    y, grads = with_grads(selective_scan, single, delta_softplus=True)
    assert_close(y, expected, 1e-5)
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        assert_close(grad, expected_grads[name], 2e-5, name)


def test_softplus_is_exact_and_never_nan():
    from vmamba_mm.ops.selective_scan.chunked import softplus
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    exact = torch.logaddexp(x.double(), torch.zeros((), dtype=torch.float64))
    error = (softplus(x).double() - exact).abs() / exact.clamp_min(1e-37)
    assert error.max() < 1e-6


def test_nan_stays_in_its_sample():
    inputs = selective_scan_inputs(3, 2, 2, 30, 2)
    clean = selective_scan(**inputs, delta_softplus=True)
    inputs['u'][1, 0, 7] = torch.nan
    y = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(y[1, 0, :7], clean[1, 0, :7])
    assert y[1, 0, 7:].isnan().all()


def test_dtype_policy_holds_under_autocast():
    inputs = selective_scan_inputs(1, 1, 2, 20, 2)
    expected = selective_scan(**inputs, delta_softplus=True)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(selective_scan(**inputs, delta_softplus=True), expected)


def test_flops_are_the_papers():
    inputs = selective_scan_inputs(2, 4, 3, 10, 5)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**inputs)
    assert counter.get_total_flops() == 2 * (9 * 2 * 10 * 12 * 5 + 2 * 10 * 12)


def test_wrong_input_raises():
    inputs = selective_scan_inputs(1, 2, 3, 4, 2)
    with pytest.raises(ValueError, match="'triton_x'.*'reference', 'chunked'"):
        selective_scan(**inputs, backend='triton_x')
    with pytest.raises(ValueError, match='expects C of shape'):
        selective_scan(**dict(inputs, C=inputs['C'][..., :2]))
    with pytest.raises(ValueError, match='divisible by'):
        selective_scan(**dict(inputs, B=inputs['B'].repeat(1, 2, 1, 1)))


@pytest.mark.skipif(not PARITY.exists(), reason='needs ../shared/parity, which a clone lacks')
def test_matches_the_published_code():
    for case in torch.load(PARITY, weights_only=True):
        y, grads = with_grads(selective_scan, case['inputs'], case['gy'], delta_softplus=True)
        assert_close(y, case['y'], 1e-5)
        for name, grad in grads.items():
            assert_close(grad, case['grads'][name], 1e-5, name)
