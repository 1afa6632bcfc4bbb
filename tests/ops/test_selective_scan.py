import pytest
import torch

from vmamba_mm.ops import selective_scan
from vmamba_mm.ops.selective_scan import chunked, stepwise
from vmamba_mm.testing import (
    assert_close,
    selective_scan_inputs,
    with_grads,
)


def autograd_reference(u, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False):
    """The specification differentiated by autograd: no code of the op's own backward."""
    return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias,
                          delta_softplus=delta_softplus, backend='reference')


@pytest.mark.parametrize('many_states', [0, 1 << 40], ids=['stepwise', 'chunks'])
@pytest.mark.parametrize('value', [-1e4, -30.0, 0.0, 20.0, 1e3, 6e4])
def test_extreme_delta_is_finite_and_right(value, many_states, monkeypatch):
    monkeypatch.setattr(chunked, '_MANY_STATES', many_states)
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
    from vmamba_mm.ops.selective_scan.activations import softplus
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


@pytest.mark.parametrize('reverse', [False, True])
def test_both_ways_and_any_blocks_give_the_same(reverse, monkeypatch):
    """Step by step, where blocks of samples and steps may be of any size, and chunk by chunk."""
    inputs = list(selective_scan_inputs(3, 2, 4, 37, 5, dtype=torch.float64).values())
    z, grad_y = torch.randn(2, 3, 8, 37, dtype=torch.float64)
    state, grad_state = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    arguments = *inputs, z, state, True, True, reverse

    def run():
        return [*chunked.forward(*arguments, torch.float64),
                *chunked.backward(grad_y, grad_state, *arguments)]

    expected = run()
    monkeypatch.setattr(chunked, '_MANY_STATES', 0)
    for budget in (1, 160, 1 << 20):
        monkeypatch.setattr(stepwise, '_BLOCK', budget)
        monkeypatch.setattr(stepwise, '_STEP', budget)
        for one, right in zip(run(), expected, strict=True):
            assert_close(one, right, 1e-12)
