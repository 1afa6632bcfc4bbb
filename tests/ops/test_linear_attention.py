"""What is special about linear_attention; op_specs/linear_attention.py has the rest."""

import pytest
import torch

from vmamba_mm.ops import linear_attention
from vmamba_mm.ops.rotation import map_rotation_table, rotate_pairs, rotation_table
from vmamba_mm.testing import assert_close


@pytest.mark.parametrize('augmented', [False, True])
def test_half_precision_of_large_maps(augmented):
    """Sums over 70,000 tokens stay within the range of fp16, also where one token of them has
    nearly all the weight."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 70000, 1, 4).unbind(0)
    k[:, 7] = 30.0
    v = v + 20
    leaves = [t.half().requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, right = (linear_attention(*t, augmented=augmented) for t in (leaves, exact))
    assert_close(y, right, 2e-3)
    grad = torch.rand_like(right)
    grads = torch.autograd.grad(y, leaves, grad.half())
    assert all(one.isfinite().all() for one in grads)
    assert_close(grads[2], torch.autograd.grad(right, exact, grad)[2], 5e-3, 'gradient by v')


def test_weights_that_are_equal_change_nothing():
    """Rank augmentation of equal keys is no augmentation."""
    q, v = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 3)
    k = torch.randn(2, 1, 2, 4).expand(-1, 5, -1, -1)
    torch.testing.assert_close(linear_attention(q, k, v, augmented=True), linear_attention(q, k, v))


def test_one_token_returns_its_value():
    q, k, v = torch.randn(3, 2, 1, 2, 4, dtype=torch.float64).unbind(0)
    turns = rotation_table(torch.full((1,), 3), 8, q.dtype)
    for augmented in (False, True):
        y = linear_attention(q, k, v, turns=turns, augmented=augmented, eps=0.0)
        assert_close(y, v, 1e-12)  # the rotations of its query and of its key cancel


def test_no_gradient_by_the_table():
    q, k, v = torch.randn(3, 1, 3, 1, 2).unbind(0)
    turns = rotation_table(torch.arange(3), 2, q.dtype).requires_grad_()
    assert linear_attention(q.requires_grad_(), k, v, turns=turns).requires_grad
    with pytest.raises(ValueError, match='turns of shape'):
        linear_attention(q, k, v, turns=turns[:2])
    with pytest.raises(ValueError, match='an even number in all heads'):
        linear_attention(q[..., :1], k[..., :1], v, turns=turns[:, :0])


# --- rotations of maps ----------------------------------------------------------------------------

def test_tables_of_maps():
    table = map_rotation_table(3, 4, 16, endpoint=True, dtype=torch.float64)
    assert table.shape == (3, 4, 8, 2)
    rows, columns = (rotation_table(torch.arange(n), 8, torch.float64) for n in (3, 4))
    for h in range(3):
        for w in range(4):
            assert_close(table[h, w], torch.cat((rows[h], columns[w])), 1e-12)
    usual = map_rotation_table(3, 4, 16, endpoint=False, dtype=torch.float64)
    angles = torch.atan2(usual[1, 0, :4, 1], usual[1, 0, :4, 0])
    assert_close(angles, 10000 ** -(torch.arange(4, dtype=torch.float64) / 4), 1e-12)
    assert map_rotation_table(2, 2, 4, endpoint=True, dtype=torch.half).dtype == torch.float32


def test_scores_depend_on_distances():
    q, k = torch.randn(2, 8, dtype=torch.float64).unbind(0)
    table = map_rotation_table(6, 6, 8, endpoint=False, dtype=torch.float64)
    scores = [(rotate_pairs(q, table[a]) * rotate_pairs(k, table[b])).sum()
              for a, b in (((1, 2), (3, 1)), ((2, 4), (4, 3)), ((0, 5), (2, 4)))]
    assert_close(torch.stack(scores), scores[0].expand(3), 1e-12)
