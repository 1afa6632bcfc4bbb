"""Retention: its three forms, pieces of a text, and one token at a time."""

import pytest
import torch
from op_specs.retention import make

from vmamba_mm.ops import retention, retention_step
from vmamba_mm.ops.retention.reference import forward
from vmamba_mm.testing import assert_close


def by_form(inputs, state=None, **options):
    return forward(*inputs.values(), state, True, **options)


@pytest.mark.parametrize('length', [1, 4, 13])
def test_the_three_forms_are_one(length):
    inputs = make(2, length, 3, 4, 5)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))
    for before in (None, state):
        y, last = by_form(inputs, before)
        for options in (dict(mode='parallel'), dict(mode='chunkwise'),
                        dict(mode='chunkwise', chunk_len=3)):
            found, found_last = by_form(inputs, before, **options)
            assert_close(found, y, 1e-12)
            assert_close(found_last, last, 1e-12)


def test_pieces_and_single_tokens():
    inputs = make(2, 11, 3, 4, 5)
    *tokens, log_decay = inputs.values()
    y, last = retention(*tokens, log_decay, return_final_state=True)
    first, state = retention(*(t[:, :7] for t in tokens), log_decay, return_final_state=True)
    pieces = [first]
    for t in range(7, 11):
        piece, state = retention_step(state, *(one[:, t] for one in tokens), log_decay)
        pieces.append(piece[:, None])
    assert_close(torch.cat(pieces, 1), y, 1e-12)
    assert_close(state, last, 1e-12)


def test_long_texts_in_blocks():
    """With the decays of a published model, of which the slowest keeps half after 350 tokens."""
    inputs = make(1, 3000, 2, 16, 8)
    inputs['log_decay'] = torch.log1p(-2.0 ** -torch.tensor([5.0, 9.0], dtype=torch.float64))
    expected = by_form(inputs, mode='parallel')[0]
    assert_close(retention(**inputs), expected, 1e-11)
    half = {k: t.float() for k, t in inputs.items()}
    assert_close(retention(**half), expected, 1e-4)


@pytest.mark.parametrize('change, message', [
    (dict(k=torch.zeros(1, 2, 3)), r'expects q and k \(B, H, N\) and v \(B, H, P\)'),
    (dict(log_decay=torch.zeros(3)), r'retention_step expects log_decay of shape \(2,\)'),
    (dict(state=torch.zeros(1, 2, 4, 5)), r'expects a state of shape \(1, 2, 5, 4\)')])
def test_wrong_inputs_of_a_step(change, message):
    right = dict(state=torch.zeros(1, 2, 5, 4), q=torch.zeros(1, 2, 4), k=torch.zeros(1, 2, 4),
                 v=torch.zeros(1, 2, 5), log_decay=torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        retention_step(**{**right, **change})
