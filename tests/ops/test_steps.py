"""Sequences in pieces and token by token: the states of ``selective_scan`` and ``causal_conv``."""

import pytest
import torch

from vmamba_mm.ops import (
    causal_conv,
    causal_conv_step,
    selective_scan,
    selective_scan_step,
)
from vmamba_mm.testing import assert_close, selective_scan_inputs

SEQUENCES = 'u', 'delta', 'B', 'C', 'z'


def scan_inputs(*shape, dtype=torch.float64):
    inputs = selective_scan_inputs(*shape, dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)
    inputs['z'] = torch.randn(inputs['u'].shape, generator=rng, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: t.to(dtype if name in SEQUENCES else wide) for name, t in inputs.items()}


def pick(inputs, index):
    return {name: t[..., index] if name in SEQUENCES else t for name, t in inputs.items()}


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('reverse', [False, True])
def test_scan_in_pieces_is_the_scan(backend, reverse):
    inputs = scan_inputs(2, 2, 3, 23, 4)
    options = dict(delta_softplus=True, return_final_state=True, reverse=reverse, backend=backend)
    whole, last = selective_scan(**inputs, **options)
    pieces = [slice(0, 1), slice(1, 10), slice(10, 23)]
    ys, state = {}, None
    for piece in pieces[::-1] if reverse else pieces:
        ys[piece.start], state = selective_scan(**pick(inputs, piece), initial_state=state,
                                                **options)
    assert_close(torch.cat([ys[piece.start] for piece in pieces], dim=2), whole, 1e-12)
    assert_close(state, last, 1e-12)


@pytest.mark.parametrize('bare', [False, True])
def test_scan_step_by_step_is_the_scan(bare):
    inputs = scan_inputs(2, 2, 3, 9, 4)
    if bare:
        inputs = {name: t for name, t in inputs.items() if name not in ('z', 'D', 'delta_bias')}
    whole, last = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    state = torch.zeros(2, 6, 4, dtype=torch.float64)
    for t in range(9):
        before = state.clone()
        y, new = selective_scan_step(state, **pick(inputs, t), delta_softplus=True)
        assert torch.equal(state, before)
        assert_close(y, whole[..., t], 1e-12)
        state = new
    assert_close(state, last, 1e-12)


def test_gradient_flows_through_steps_as_through_the_scan():
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(1, 1, 2, 4, 3).items()}
    whole = selective_scan(**inputs, delta_softplus=True)
    state, ys = torch.zeros(1, 2, 3, dtype=torch.float64), []
    for t in range(4):
        y, state = selective_scan_step(state, **pick(inputs, t), delta_softplus=True)
        ys.append(y)
    leaves = list(inputs.values())
    for one, right in zip(torch.autograd.grad(torch.stack(ys, -1).square().sum(), leaves),
                          torch.autograd.grad(whole.square().sum(), leaves), strict=True):
        assert_close(one, right, 1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_states_of_scans_are_single_in_half_precision(dtype):
    inputs = scan_inputs(1, 2, 3, 20, 4, dtype=dtype)
    exact = {name: t.double() for name, t in inputs.items()}
    _, right = selective_scan(**exact, delta_softplus=True, return_final_state=True)
    with torch.autocast('cpu', torch.bfloat16):
        y, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert_close(state, right, 1e-5)
    first = {name: t[..., :1] if name in SEQUENCES else t for name, t in exact.items()}
    _, right = selective_scan(**first, delta_softplus=True, initial_state=state.double(),
                              return_final_state=True)
    with torch.autocast('cpu', torch.bfloat16):
        y, new = selective_scan_step(state, **pick(inputs, 0), delta_softplus=True)
    assert y.dtype == dtype and new.dtype == torch.float32
    assert_close(new, right, 1e-5)


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('taps', [1, 4, 6])
def test_convolution_in_pieces_is_the_convolution(backend, reverse, taps):
    """The first piece is shorter than the taps reach."""
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, taps).double(), torch.randn(3).double()
    options = dict(reverse=reverse, return_final_state=True, backend=backend)
    whole, last = causal_conv(x, weight, bias, **options)
    pieces = [slice(0, 2), slice(2, 3), slice(3, 10), slice(10, 12)]
    ys, state = {}, None
    for piece in pieces[::-1] if reverse else pieces:
        ys[piece.start], state = causal_conv(x[:, piece], weight, bias, initial_state=state,
                                             **options)
    assert_close(torch.cat([ys[piece.start] for piece in pieces], dim=1), whole, 1e-12)
    assert torch.equal(state, last) and state.shape == (2, taps - 1, 3)


@pytest.mark.parametrize('taps', [1, 4])
def test_convolution_step_by_step_is_the_convolution(taps):
    x, weight, bias = torch.randn(2, 7, 3), torch.randn(3, taps), torch.randn(3)
    whole, last = causal_conv(x, weight, bias, return_final_state=True)
    state = torch.zeros(2, taps - 1, 3)
    for t in range(7):
        before = state.clone()
        y, new = causal_conv_step(state, x[:, t], weight, bias)
        assert torch.equal(state, before)
        assert_close(y, whole[:, t], 1e-6)
        state = new
    assert torch.equal(state, last)


def test_convolution_keeps_the_layout_of_its_input():
    weight = torch.randn(6, 4)
    channel_first = torch.randn(2, 6, 9)
    y = causal_conv(channel_first.transpose(1, 2), weight)
    assert y.transpose(1, 2).is_contiguous()
    assert_close(y, causal_conv(channel_first.transpose(1, 2).contiguous(), weight), 1e-6)
    expected = torch.nn.functional.conv1d(channel_first, weight[:, None], padding=3, groups=6)
    assert_close(y.transpose(1, 2), torch.nn.functional.silu(expected[..., :9]), 1e-6)


def test_strong_decay_forgets_the_first_state():
    """Where exp(delta A) is zero, the state and its gradient are those of the last step alone."""
    inputs = scan_inputs(1, 1, 2, 5, 3, dtype=torch.float32)
    inputs['A'] = torch.full_like(inputs['A'], -1e4)
    inputs['delta'] = inputs['delta'].abs() + 1
    state = torch.randn(1, 2, 3).requires_grad_()
    y, last = selective_scan(**inputs, initial_state=state, return_final_state=True)
    without, same = selective_scan(**inputs, return_final_state=True)
    assert torch.equal(y, without) and torch.equal(last, same)
    by_state, = torch.autograd.grad(y.sum() + last.sum(), state)
    assert torch.equal(by_state, torch.zeros_like(state))


def test_only_the_final_state_may_be_used():
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(1, 2, 2, 6, 3).items()}
    names = [name for name in inputs if name not in ('C', 'D', 'z')]
    leaves = [inputs[name] for name in names]
    grads = [torch.autograd.grad(selective_scan(
        **inputs, delta_softplus=True, return_final_state=True, backend=backend)[1].square().sum(),
        leaves) for backend in ('chunked', 'reference')]
    for name, one, right in zip(names, *grads, strict=True):
        assert_close(one, right, 1e-12, name)


def test_transforms_see_the_states():
    inputs = scan_inputs(2, 1, 3, 6, 2)

    def run_scan(u, z, state):
        return selective_scan(**inputs | dict(u=u, z=z), delta_softplus=True, initial_state=state,
                              return_final_state=True, reverse=True)

    u, z = torch.randn(2, 4, 2, 3, 6, dtype=torch.float64)
    state = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    ys, lasts = torch.func.vmap(run_scan)(u, z, state)
    for i in range(4):
        y, last = run_scan(u[i], z[i], state[i])
        assert_close(ys[i], y, 1e-12)
        assert_close(lasts[i], last, 1e-12)

    def loss(state):
        y, last = run_scan(u[0], z[0], state)
        return y.sum() + last.square().sum()

    expected, = torch.autograd.grad(loss(leaf := state[0].clone().requires_grad_()), leaf)
    assert_close(torch.func.grad(loss)(state[0]), expected, 1e-12)


def test_steps_compile_without_a_break():
    inputs = pick(scan_inputs(2, 1, 4, 1, 2, dtype=torch.float32), 0)

    def step(conv_state, state, weight):
        x, conv_state = causal_conv_step(conv_state, inputs['u'], weight)
        y, state = selective_scan_step(state, **inputs | dict(u=x), delta_softplus=True)
        return y, conv_state, state

    given = torch.randn(2, 3, 4), torch.randn(2, 4, 2), torch.randn(4, 4)
    for one, right in zip(torch.compile(step, fullgraph=True, backend='aot_eager')(*given),
                          step(*given), strict=True):
        assert_close(one, right, 1e-6)


def test_wrong_shapes_of_a_step_are_named():
    state, u, B = torch.zeros(2, 8, 4), torch.randn(2, 8), torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match=r'expects state of shape \(2, 8, 4\).*got \(2, 8, 3\)'):
        selective_scan_step(state[..., :3], u, u, torch.zeros(8, 4), B, B)
    with pytest.raises(ValueError, match=r'expects state \(B, W - 1, D\)'):
        causal_conv_step(torch.zeros(2, 4, 8), u, torch.zeros(8, 4))
