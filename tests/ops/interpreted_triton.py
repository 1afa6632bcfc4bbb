"""The Triton kernels in Triton's interpreter, without a GPU: run by test_triton.py.

By hand: ``TRITON_INTERPRET=1 pytest tests/ops/interpreted_triton.py``; the variable must be set
before triton is imported. It takes milliseconds for each position, hence the sizes.
"""

from functools import partial

import pytest
import torch
from scan_by_hand import scan_by_hand

from vmamba_mm.ops import scan_norm, selective_scan, ss2d_scan
from vmamba_mm.ops.scan_kernels import triton_backend
from vmamba_mm.ops.ss2d_scan import reference
from vmamba_mm.testing import (
    assert_close,
    selective_scan_inputs,
    ss2d_scan_inputs,
    with_grads,
)

HALF = (torch.float16, torch.bfloat16)


def ss2d_reference(**inputs):
    """The specification differentiated by autograd: no code of the op's own backward."""
    return reference.forward(*inputs.values(), out_dtype=inputs['x'].dtype)


def check(op, specification, inputs, rtol=1e-5, **kwargs):
    """Result and every gradient beside the specification in fp64, of the same fp32 inputs."""
    expected, expected_grads = with_grads(
        specification, {name: t.double() for name, t in inputs.items()}, **kwargs)
    y, grads = with_grads(op, inputs, backend='triton', **kwargs)
    assert_close(y, expected, rtol, 'y')
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, expected_grads[name], rtol, f'gradient by {name}')
    return y


@pytest.mark.parametrize('scan', ['unidirectional', 'bidirectional', 'cascade'])
def test_patterns(scan):
    inputs = ss2d_scan_inputs(1, 4, 3, 4)
    inputs |= dict(norm_weight=inputs['D'][:4].clone(), norm_bias=inputs['D'][4:8].clone())
    check(scan_norm, scan_by_hand, inputs, 1e-4, eps=1e-3, scan=scan)


def test_batch_in_blocks(monkeypatch):
    monkeypatch.setattr(triton_backend, '_BLOCK', 1)
    check(ss2d_scan, ss2d_reference, ss2d_scan_inputs(3, 2, 2, 3))
    check(selective_scan, partial(selective_scan, backend='reference'),
          selective_scan_inputs(3, 2, 2, 5, 1))


def test_several_tiles_of_a_program(monkeypatch):
    from vmamba_mm.ops.scan_kernels import triton_launch
    monkeypatch.setattr(triton_launch, '_PROGRAMS', 1)
    check(ss2d_scan, ss2d_reference, ss2d_scan_inputs(1, 2, 4, 5, state=2))


@pytest.mark.parametrize('bias', [-40., 20., 1e3])
def test_extreme_delta(bias):
    inputs = ss2d_scan_inputs(1, 3, 2, 5)
    inputs['dt_projs_bias'].fill_(bias)
    check(ss2d_scan, ss2d_reference, inputs, 2e-5)


def test_is_not_chosen_for_a_cpu():
    inputs = ss2d_scan_inputs(1, 2, 2, 3)
    assert torch.equal(ss2d_scan(**inputs), ss2d_scan(**inputs, backend='chunked'))
    with pytest.raises(ValueError, match='the kernels take and give float32'):
        ss2d_scan(**{name: t.double() for name, t in inputs.items()}, backend='triton')


def test_farthest_points():
    """As the loop in PyTorch chooses them, with ties, points at the origin, and none left."""
    from vmamba_mm.ops.points.sampling import NEAR_ORIGIN, _places_by_loop
    from vmamba_mm.ops.points.triton_sampling import farthest_places

    torch.manual_seed(0)
    for count, num in ((1, 3), (5, 7), (16, 9), (70, 12)):
        points = torch.randint(-2, 3, (3, 3, count)).float() / 2
        found = farthest_places(points, num, NEAR_ORIGIN)
        assert torch.equal(found, _places_by_loop(points, num)), count


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-6), *((half, 5e-3) for half in HALF)],
                         ids=str)
@pytest.mark.parametrize('augmented', [False, True])
@pytest.mark.parametrize('splits', [1, 3])
def test_linear_attention_in_parts(monkeypatch, dtype, limit, augmented, splits):
    """Parts of the tokens, of which the last one is short; queries, keys and values of one map."""
    from vmamba_mm.ops import linear_attention
    from vmamba_mm.ops.linear_attention import triton_backend
    from vmamba_mm.ops.rotation import map_rotation_table

    monkeypatch.setattr(triton_backend, 'force_splits', splits)
    torch.manual_seed(0)
    heads, channels = 2, 24
    qkv = torch.randn(2, 14 * 10, 3, heads, channels).to(dtype)
    # A score far above the others at the end, and one far below all.
    qkv[:, -1, 1] *= 5
    qkv[0, 0, 1] = -30
    grad = torch.randn(2, 14 * 10, heads, channels).to(dtype)

    def run(backend, to):
        leaf = qkv.to(to).requires_grad_()
        turns = map_rotation_table(14, 10, heads * channels, endpoint=False, dtype=to).flatten(0, 1)
        y = linear_attention(*leaf.unbind(2), turns=turns, augmented=augmented, backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaf, grad.to(to))[0].unbind(2)

    for one, right in zip(run('triton', dtype), run('reference', torch.float64), strict=True):
        assert one.dtype == dtype
        assert (one.double() - right).norm() <= limit * right.norm()
