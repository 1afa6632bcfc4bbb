"""Multi-scale retention: its forms, its state, and a text in pieces."""

import pytest
import torch

from vmamba_mm.layers import MultiScaleRetention, RetentionState
from vmamba_mm.ops.retention import log_decays
from vmamba_mm.testing import assert_close


def make(form='chunkwise', eps=1e-6):
    torch.manual_seed(0)
    return MultiScaleRetention(12, 18, 3, eps, form).double()


def tokens(length, batch=2):
    return torch.randn(batch, length, 12, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(1))


def test_the_forms_differ_by_the_epsilon_of_the_norm():
    for eps, limit in ((1e-6, 1e-4), (1e-30, 1e-12)):
        chunkwise, parallel = make('chunkwise', eps), make('parallel', eps)
        x = tokens(13).requires_grad_()
        found = [[y := layer(x), *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]
                 for layer in (chunkwise, parallel)]
        for one, other in zip(*found, strict=True):
            assert_close(one, other, limit)
    y, other = (make(form, eps=0.1)(10 * tokens(13)) for form in ('chunkwise', 'parallel'))
    assert (y - other).abs().max() > 1e-3 * other.abs().max()


@pytest.mark.parametrize('form', ['chunkwise', 'parallel'])
def test_pieces_and_single_tokens(form):
    layer, x = make(form, eps=1e-30), tokens(11)
    first, state = layer(x[:, :6], layer.init_state(2))
    kept = RetentionState(*(t.clone() for t in state))
    pieces = [first]
    y, after = layer(x[:, 6:9], state)
    pieces.append(y)
    for t in (9, 10):
        y, after = layer.step(x[:, t], after)
        pieces.append(y[:, None])
    assert_close(torch.cat(pieces, 1), layer(x), 1e-12)
    assert all(map(torch.equal, state, kept)) and after.seen.tolist() == [11, 11]
    assert after.memory.shape == (2, 3, 6, 4)


def test_texts_of_several_lengths_in_one_state():
    layer, x = make(), tokens(9)
    states = [layer(x[i:i + 1, :length], layer.init_state(1))[1] for i, length in ((0, 4), (1, 7))]
    joined = RetentionState(*map(torch.cat, zip(*states, strict=True)))
    y, _ = layer.step(torch.stack([x[0, 4], x[1, 7]]), joined)
    for i, length in ((0, 5), (1, 8)):
        assert_close(y[i:i + 1], layer(x[i:i + 1, :length], layer.init_state(1))[0][:, -1], 1e-12)


def test_decays():
    found = log_decays(4, torch.zeros(0)).exp()
    torch.testing.assert_close(found, 1 - 2.0 ** -torch.tensor([5.0, 6, 7, 8]))
    assert log_decays(2, torch.zeros(0, dtype=torch.bfloat16)).dtype == torch.float32


def test_half_precision_with_large_values():
    """The sums over a long text do not overflow before the norm."""
    torch.manual_seed(0)
    layer = MultiScaleRetention(16, 32, 1)
    x = 30 * torch.randn(1, 400, 16)
    with torch.no_grad():
        exact, cast = layer(x), layer.half()(x.half())
    assert cast.isfinite().all() and (cast - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize('arguments, message', [
    (dict(num_heads=4), 'num_heads=4 must leave each head an even number of the 12 channels'),
    (dict(num_heads=2, value_dims=9), 'and divide the 9 of values'),
    (dict(form='recurrent'), r"form='recurrent' does not exist; choose one of \('chunkwise', ")])
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleRetention(**dict(embed_dims=12, value_dims=12) | arguments)
