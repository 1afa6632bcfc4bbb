"""causal_conv1d, and the extension causal_conv1d_cuda in the forms that its versions have."""

import pytest
import torch
from s6_by_hand import conv, gradients, on, random, tolerance

from vmamba_mm.testing import DEVICES, assert_close

BATCH, CHANNELS, LENGTH = 2, 5, 9


def inputs(width=4, length=LENGTH):
    return (random(BATCH, CHANNELS, length), random(CHANNELS, width, seed=1),
            random(CHANNELS, seed=2))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('activation', [None, 'silu', 'swish'])
def test_causal_conv1d_fn(activation, width, device):
    from causal_conv1d import causal_conv1d_fn
    tensors = inputs(width)
    expected, grads = gradients(lambda *args: conv(*args, activation is not None), tensors)
    y, found = gradients(lambda *args: causal_conv1d_fn(*args, activation=activation),
                         on(device, tensors))
    for actual, wanted in zip([y, *found], [expected, *grads], strict=True):
        assert_close(actual.cpu(), wanted, tolerance(device))


def test_the_activation_was_the_fourth_argument_once():
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
    x, weight, bias = inputs()
    for function in (causal_conv1d_fn, causal_conv1d_ref):
        assert_close(function(x, weight, bias, 'silu'), conv(x, weight, bias), 1e-10)
        assert_close(function(x, weight, None, None), conv(x, weight, None, False), 1e-10)


@pytest.mark.parametrize('channels_last', [True, False])
def test_states_join_two_parts(channels_last):
    from causal_conv1d import causal_conv1d_fn
    x, weight, bias = inputs()
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    first, state = causal_conv1d_fn(x[..., :4], weight, bias, return_final_states=True,
                                    activation='silu')
    assert_close(state, x[..., 1:4], 1e-10)
    into = torch.empty(BATCH, CHANNELS, 3, dtype=x.dtype)
    second, final = causal_conv1d_fn(x[..., 4:], weight, bias, initial_states=state,
                                     return_final_states=True, final_states_out=into,
                                     activation='silu')
    assert final is into and torch.equal(into, x[..., -3:])
    assert_close(torch.cat([first, second], -1), conv(x, weight, bias), 1e-10)


@pytest.mark.parametrize('activation', [None, 'silu'])
def test_sequences_in_one_sample(activation):
    from causal_conv1d import causal_conv1d_fn
    tensors, lengths = inputs(), [2, 1, 6]
    seq_idx = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2], dtype=torch.int32).expand(BATCH, -1)

    def by_hand(x, weight, bias):
        return torch.cat([conv(part, weight, bias, activation is not None)
                          for part in x.split(lengths, -1)], -1)

    expected, grads = gradients(by_hand, tensors)
    y, found = gradients(lambda *args: causal_conv1d_fn(*args, seq_idx, activation=activation),
                         tensors)
    for actual, wanted in zip([y, *found], [expected, *grads], strict=True):
        assert_close(actual, wanted, 1e-10)


def test_what_is_not_covered_is_refused():
    import causal_conv1d_cuda
    from causal_conv1d import causal_conv1d_fn
    x, weight, bias = inputs()
    seq_idx = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    with pytest.raises(ValueError, match='takes seq_idx without initial_states'):
        causal_conv1d_fn(x, weight, bias, seq_idx, return_final_states=True)
    with pytest.raises(NotImplementedError, match='has no seq_idx'):
        causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, seq_idx, True)
    with pytest.raises(NotImplementedError, match="must be None, 'silu' or 'swish', got 'gelu'"):
        causal_conv1d_fn(x, weight, bias, activation='gelu')


# --- decoding -------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [3, 4, 7])
@pytest.mark.parametrize('tokens', [0, 1, 3])
@pytest.mark.parametrize('ring', [False, True])
def test_causal_conv1d_update(ring, tokens, size):
    """One token without a dimension of time, or as many at once."""
    from causal_conv1d import causal_conv1d_update
    x, weight, bias = inputs()
    state, outputs = torch.zeros(BATCH, CHANNELS, size, dtype=x.dtype), []
    for start in range(0, LENGTH, tokens or 1):
        new = x[..., start:start + tokens] if tokens else x[..., start]
        seen = torch.full((BATCH,), start, dtype=torch.int32) if ring else None
        y = causal_conv1d_update(new, state, weight, bias, 'silu', seen)
        assert y.shape == new.shape
        outputs.append(y if tokens else y[..., None])
    assert_close(torch.cat(outputs, -1), conv(x, weight, bias), 1e-10)
    if not ring:
        assert torch.equal(state, x[..., -size:])


def test_update_of_rows_of_a_larger_state():
    from causal_conv1d import causal_conv1d_update
    x, weight, bias = inputs()
    state = random(4, CHANNELS, 4, seed=5)
    before = state.clone()
    rows = torch.tensor([2, 0], dtype=torch.int32)
    y = causal_conv1d_update(x[..., 0], state, weight, bias, None, None, rows)
    assert_close(y, ((torch.cat([before[[2, 0]], x[..., :1]], -1)[..., -4:] * weight).sum(-1)
                     + bias), 1e-10)
    assert torch.equal(state[[1, 3]], before[[1, 3]])
    assert torch.equal(state[[2, 0]][..., -1], x[..., 0])
    before = state.clone()
    y = causal_conv1d_update(x[..., 1:3], state, weight, bias, None, None, torch.tensor([-1, 1]))
    assert (y[0] == 0).all() and (y[1] != 0).all()  # the first sample is padding
    assert torch.equal(state[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(state[1, :, -2:], x[1, :, 1:3])
    with pytest.raises(ValueError, match='expects a conv_state of 3 positions or more'):
        causal_conv1d_update(x[..., 0], state[:2, :, :2], weight, bias)


# --- causal_conv1d_cuda ---------------------------------------------------------------------------

def by_hand(x, weight, bias, dout):
    """The result and the gradients by x, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = conv(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dout)


@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2', '1.5'])
def test_arguments_of_the_extension_by_version(version):
    import causal_conv1d_cuda
    x, weight, bias = inputs()
    dout = random(*x.shape, seed=3)
    expected, (dx, dweight, dbias) = by_hand(x, weight, bias, dout)
    final, out = torch.empty(BATCH, CHANNELS, 3, dtype=x.dtype), torch.empty_like(x)
    middle = {'1.0': [], '1.1': [None], '1.2': [None, None, final],
              '1.5': [None, None, out, final]}[version]
    y = causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, *middle, True)
    if version == '1.5':
        assert y is None
        y = out
    assert_close(y, expected, 1e-10)
    if len(middle) > 2:
        assert torch.equal(final, x[..., -3:])

    dxz = torch.empty(BATCH, 2 * CHANNELS, LENGTH, dtype=x.dtype)
    into = dxz[:, :CHANNELS]  # callers give a part of a larger tensor
    if version == '1.5':
        grads = [into, torch.empty_like(weight), torch.empty_like(bias)]
        assert causal_conv1d_cuda.causal_conv1d_bwd(
            x, weight, bias, dout, None, None, None, *grads, None, True) is None
    else:
        middle = {'1.0': [into], '1.1': [None, into], '1.2': [None, None, None, into, False]}
        grads = causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, dout, *middle[version], True)
        assert len(grads) == (4 if version == '1.2' else 3) and grads[0] is into
    for actual, wanted in zip(grads, (dx, dweight, dbias), strict=False):
        assert_close(actual, wanted, 1e-10)

    state = random(BATCH, CHANNELS, 4, seed=4)
    step = (torch.cat([state, x[..., :1]], -1)[..., -4:] * weight).sum(-1) + bias
    one = torch.empty(BATCH, CHANNELS, dtype=x.dtype)
    arguments = {'1.5': [one, True, None, None], '1.2': [True, None]}.get(version, [True])
    y = causal_conv1d_cuda.causal_conv1d_update(x[..., 0], state, weight, bias, *arguments)
    assert_close(one if version == '1.5' else y, torch.nn.functional.silu(step), 1e-10)
    assert torch.equal(state[..., -1], x[..., 0])


def test_gradients_by_states_and_without_a_bias():
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
    x, weight, _ = inputs(length=5)
    initial, dout = random(BATCH, CHANNELS, 3, seed=6), random(BATCH, CHANNELS, 5, seed=7)
    dfinal = random(BATCH, CHANNELS, 3, seed=8)
    leaves = [t.clone().requires_grad_() for t in (x, weight, initial)]
    long = torch.cat([leaves[2], leaves[0]], -1)
    y = conv(long, leaves[1], None)[..., 3:]
    expected = torch.autograd.grad([y, long[..., -3:]], leaves, [dout, dfinal])
    final = torch.empty_like(initial)
    found = causal_conv1d_fwd_function(x, weight, None, None, initial, final, True)
    assert_close(found, y.detach(), 1e-10)
    assert torch.equal(final, x[..., -3:])
    dx, dweight, dbias, dinitial = causal_conv1d_bwd_function(
        x, weight, None, dout, None, initial, dfinal, None, True, True)
    assert dbias is None
    for actual, wanted in zip((dx, dweight, dinitial), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


@pytest.mark.parametrize('name, count, known', [
    ('causal_conv1d_fwd', 6, '4, 5, 7 or 8'), ('causal_conv1d_bwd', 8, '6, 7, 10 or 12'),
    ('causal_conv1d_update', 9, '5, 6, 7 or 8')])
def test_other_numbers_of_arguments(name, count, known):
    import causal_conv1d_cuda
    with pytest.raises(TypeError, match=f'{name} .* takes {known} arguments.* got {count}'):
        getattr(causal_conv1d_cuda, name)(*[None] * count)
