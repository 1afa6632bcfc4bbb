import pytest
import torch

from vmamba_mm.ops import mamba_inner
from vmamba_mm.ops.selective_scan import stepwise
from vmamba_mm.testing import assert_close, mamba_inner_inputs, with_grads


def direction(inputs, k):
    """The inputs of one of both directions."""
    return {name: t if name == 'xz' else t[k:k + 1] for name, t in inputs.items()}


@pytest.mark.parametrize('budget', [1, 40, 1 << 20])
def test_samples_and_steps_in_blocks(budget, monkeypatch):
    inputs = mamba_inner_inputs(5, 2, 3, 11, 4, 2, dtype=torch.float64)
    expected, expected_grads = with_grads(mamba_inner, inputs, backend='reference')
    monkeypatch.setattr(stepwise, '_STEP', budget)
    monkeypatch.setattr(stepwise, '_BLOCK', budget)
    y, grads = with_grads(mamba_inner, inputs, backend='chunked')
    assert_close(y, expected, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-12, name)


def test_directions_are_summed_and_scaled():
    inputs = mamba_inner_inputs(2, 2, 4, 9, 3, 2, dtype=torch.float64)
    forward = mamba_inner(**direction(inputs, 0))
    backward = mamba_inner(**direction(inputs, 1), reverse=True)
    assert_close(mamba_inner(**inputs, scale=0.5), (forward + backward) / 2, 1e-12)
    flipped = direction(inputs, 1) | dict(xz=inputs['xz'].flip(1))
    assert_close(backward, mamba_inner(**flipped).flip(1), 1e-12)


def test_a_direction_sees_what_it_may():
    """Forward: nothing that comes later; backward: nothing that comes before."""
    inputs = mamba_inner_inputs(1, 1, 4, 9, 3, 2, dtype=torch.float64)
    changed = inputs | dict(xz=inputs['xz'].clone())
    changed['xz'][:, 4] += 1
    for reverse in (False, True):
        is_same = (mamba_inner(**inputs, reverse=reverse)
                   == mamba_inner(**changed, reverse=reverse)).all(-1)[0]
        assert is_same.tolist() == [*[not reverse] * 4, False, *[reverse] * 4]


def test_dtype_policy_holds_under_autocast():
    inputs = mamba_inner_inputs(1, 2, 4, 9, 3, 2)
    expected = mamba_inner(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        for backend in (None, 'reference'):
            assert_close(mamba_inner(**inputs, backend=backend), expected, 1e-6)


def test_both_directions_cannot_be_reversed():
    with pytest.raises(ValueError, match='reverse is for K = 1'):
        mamba_inner(**mamba_inner_inputs(1, 2, 4, 9, 3, 2), reverse=True)
