"""What is special about ``wkv`` and ``bi_wkv``; the rest is in test_ops.py."""

import pytest
import torch
from op_specs.wkv import NAMES, make, make_slow, make_stateful

from vmamba_mm.ops import bi_wkv, wkv, wkv_step
from vmamba_mm.ops.wkv import reference
from vmamba_mm.testing import assert_close


def test_gradients_through_the_state():
    """By what a state stands for, of which p is a scale."""
    def run(*leaves):
        y, state = wkv(*leaves[:4], state=leaves[4], return_state=True)
        return y, state[:, 0] / state[:, 1], state[:, 1].log() + state[:, 2]

    inputs = [t.requires_grad_() for t in make_stateful(2, 7, 3).values()]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_parts_and_steps_are_the_whole(backend):
    inputs = {name: t.requires_grad_() for name, t in make(2, 13, 4).items()}
    w, u, k, v = map(inputs.get, NAMES)
    right, right_state = wkv(w, u, k, v, return_state=True, backend=backend)
    y, state = wkv(w, u, k[:, :6], v[:, :6], return_state=True, backend=backend)
    outputs = [y]
    for t in range(6, 10):
        y, state = wkv_step(state, w, u, k[:, t], v[:, t])
        outputs.append(y[:, None])
    y, state = wkv(w, u, k[:, 10:], v[:, 10:], state=state, return_state=True, backend=backend)
    y = torch.cat((*outputs, y), 1)
    assert_close(y, right, 1e-12)
    assert_close(state, right_state, 1e-12)
    grads, right_grads = (torch.autograd.grad(t.square().sum(), [*inputs.values()])
                          for t in (y, right))
    for name, grad, right_grad in zip(inputs, grads, right_grads, strict=True):
        assert_close(grad, right_grad, 1e-12, name)


@pytest.mark.parametrize('shift', [-3000.0, 3000.0])
def test_keys_of_any_size(shift):
    """A key that is added to all is in numerators and denominators."""
    for function, inputs in ((wkv, make(2, 40, 3)), (bi_wkv, make_slow(2, 40, 3))):
        inputs = {name: t.float() for name, t in inputs.items()}
        # Multiples of 1/8, which fp32 holds beside the shift.
        inputs['k'] = (8 * inputs['k']).round() / 8
        leaves = [{name: t.clone().requires_grad_() for name, t in (
            inputs | {'k': inputs['k'] + change}).items()} for change in (0.0, shift)]
        results = [function(*one.values()) for one in leaves]
        grads = [torch.autograd.grad(y.square().sum(), [*one.values()])
                 for y, one in zip(results, leaves, strict=True)]
        assert_close(results[1], results[0], 1e-3)
        for one, right in zip(grads[1], grads[0], strict=True):
            assert one.isfinite().all()
            assert_close(one, right, 1e-2)


def test_one_large_key_takes_all():
    inputs = {name: t.float() for name, t in make_slow(1, 50, 2).items()}
    inputs['k'][:, 20] = 500
    expected = inputs['v'][:, 20].expand(49, 2)
    others = [t for t in range(50) if t != 20]
    for mode in ('paper', 'official'):
        assert_close(bi_wkv(**inputs, mode=mode)[0, others], expected, 1e-3)
    assert_close(wkv(**inputs)[0, 21:], expected[:29], 1e-5)


def test_official_mode_is_the_paper_but_for_a_decay_with_one_token_a_block():
    """With T of at most the number of blocks all that differs is a decay more of every token."""
    inputs = make_slow(2, 20, 3)
    further = inputs | dict(u=inputs['u'] + inputs['w'])
    assert_close(bi_wkv(**inputs, mode='official', blocks=20, eps=0.0), bi_wkv(**further), 1e-12)
    assert (bi_wkv(**inputs, mode='official', blocks=4) - bi_wkv(**inputs)).abs().max() > 1e-3


def test_official_gradients_by_w_and_u_are_exact():
    inputs = make_slow(2, 9, 3)
    leaves = [inputs[name].requires_grad_() for name in ('w', 'u')]
    assert torch.autograd.gradcheck(
        lambda w, u: bi_wkv(w, u, inputs['k'], inputs['v'], mode='official', blocks=3), leaves)


def test_modes_and_states_that_do_not_exist():
    inputs = make_slow(1, 4, 2)
    with pytest.raises(ValueError, match="mode='kernel' does not exist.*'paper', 'official'"):
        bi_wkv(**inputs, mode='kernel')
    with pytest.raises(ValueError, match='blocks of at least 1'):
        bi_wkv(**inputs, mode='official', blocks=0)
    state = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r'wkv_step expects v \(B, C\)'):
        wkv_step(state, *inputs.values())
    with pytest.raises(ValueError, match='wkv_step expects state of shape'):
        wkv_step(state[:, :2], inputs['w'], inputs['u'], inputs['k'][:, 0], inputs['v'][:, 0])


def test_first_step_is_that_of_the_reference():
    state = torch.zeros(1, 3, 2, dtype=torch.float64)
    state[:, 2] = -torch.inf
    w, u, k, v = make(1, 1, 2).values()
    y, state = wkv_step(state, w, u, k[:, 0], v[:, 0])
    right, right_state = reference.forward(w, u, k, v, None, True)
    assert torch.equal(y, right[:, 0]) and torch.equal(state, right_state)
