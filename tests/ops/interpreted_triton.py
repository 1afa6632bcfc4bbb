"""The Triton kernels in Triton's interpreter, without a GPU: run by test_triton.py.

By hand: ``TRITON_INTERPRET=1 pytest tests/ops/interpreted_triton.py``; the variable must be set
before triton is imported. It takes milliseconds for each position, hence the sizes.
"""

import pytest
import torch
from scan_by_hand import scan_by_hand

from vmamba_mm.ops import scan_norm, selective_scan, ss2d_scan
from vmamba_mm.ops.scan_kernels import triton_backend
from vmamba_mm.ops.selective_scan import reference as s6
from vmamba_mm.ops.ss2d_scan import reference
from vmamba_mm.testing import (
    assert_close,
    relative_error,
    selective_scan_inputs,
    ss2d_scan_inputs,
    with_grads,
)

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def numbers_are_indices(monkeypatch):
    """Triton 3.6 takes int() of an array of shape (1,) for the bounds of a loop: NumPy 2.4 refuses.

    It is the interpreter alone that does so; compiled kernels have no NumPy in them.
    """
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, '_patch_lang_tensor', patch_and_mend)


def ss2d_reference(**inputs):
    """The specification differentiated by autograd: no code of the op's own backward."""
    return reference.forward(*inputs.values(), out_dtype=inputs['x'].dtype)


def s6_reference(u, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False):
    return s6.forward(u, delta, A, B, C, D, delta_bias, delta_softplus, u.dtype)


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


@pytest.mark.parametrize('shape, sizes', [
    ((2, 3, 3, 4), {}),
    ((1, 5, 4, 7), dict(state=3, rank=3)),
    ((1, 2, 1, 11), dict(state=16, rank=1, routes=2)),
    ((2, 3, 9, 1), dict(routes=1)),
    ((1, 1, 1, 1), {}),
    ((1, 2, 3, 23), dict(routes=2)),
    ((1, 35, 2, 2), {}),
    ((1, 2, 2, 3), dict(rank=18)),
])
def test_ss2d_scan(shape, sizes):
    inputs = ss2d_scan_inputs(*shape, **sizes)
    y = check(ss2d_scan, ss2d_reference, inputs)
    assert y.stride() == inputs['x'].stride() and y.dtype == torch.float32


@pytest.mark.parametrize('scan', ['unidirectional', 'bidirectional', 'cascade'])
def test_patterns(scan):
    inputs = ss2d_scan_inputs(1, 4, 3, 4)
    inputs |= dict(norm_weight=inputs['D'][:4].clone(), norm_bias=inputs['D'][4:8].clone())
    check(scan_norm, scan_by_hand, inputs, 1e-4, eps=1e-3, scan=scan)


def test_strides():
    inputs = ss2d_scan_inputs(2, 3, 4, 3)
    expected = check(ss2d_scan, ss2d_reference, inputs)
    x = inputs['x']
    turned = x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    for other in (x.contiguous(), turned, torch.cat([x, x], dim=1)[:, 3:]):
        assert_close(check(ss2d_scan, ss2d_reference, dict(inputs, x=other)), expected, 1e-6)


def test_batch_in_blocks(monkeypatch):
    monkeypatch.setattr(triton_backend, '_BLOCK', 1)
    check(ss2d_scan, ss2d_reference, ss2d_scan_inputs(3, 2, 2, 3))
    check(selective_scan, s6_reference, selective_scan_inputs(3, 2, 2, 5, 1))


def test_several_tiles_of_a_program(monkeypatch):
    from vmamba_mm.ops.scan_kernels import triton_launch
    monkeypatch.setattr(triton_launch, '_PROGRAMS', 1)
    check(ss2d_scan, ss2d_reference, ss2d_scan_inputs(1, 2, 4, 5, state=2))


@pytest.mark.parametrize('bias', [-40., 20., 1e3])
def test_extreme_delta(bias):
    inputs = ss2d_scan_inputs(1, 3, 2, 5)
    inputs['dt_projs_bias'].fill_(bias)
    check(ss2d_scan, ss2d_reference, inputs, 2e-5)


@pytest.mark.parametrize('dtype', HALF, ids=['fp16', 'bf16'])
@pytest.mark.parametrize('op', ['ss2d_scan', 'selective_scan'])
def test_half_precision_is_no_worse_than_naive(op, dtype):
    if op == 'ss2d_scan':
        inputs, kwargs = ss2d_scan_inputs(2, 4, 3, 5, state=2), {}
        op, specification = ss2d_scan, ss2d_reference
    else:
        inputs, kwargs = selective_scan_inputs(2, 2, 4, 15, 2), dict(delta_softplus=True)
        op, specification = selective_scan, s6_reference
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    exact, exact_grads = with_grads(
        specification, {name: t.double() for name, t in inputs.items()}, **kwargs)
    naive, naive_grads = with_grads(op, inputs, backend='reference', **kwargs)
    y, grads = with_grads(op, inputs, backend='triton', **kwargs)
    assert y.dtype == dtype
    assert relative_error(y, exact) <= 2 * relative_error(naive, exact)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        limit = 2 * relative_error(naive_grads[name], exact_grads[name])
        assert relative_error(grad, exact_grads[name]) <= limit, name
    y32 = op(**inputs, out_dtype=torch.float32, backend='triton', **kwargs)
    assert y32.dtype == torch.float32
    assert_close(y32, exact, 1e-5)


def test_fp32_parameters_with_half_input():
    inputs = ss2d_scan_inputs(1, 3, 3, 3)
    inputs['x'] = inputs['x'].half()
    exact = ss2d_reference(**{name: t.double() for name, t in inputs.items()})
    with torch.autocast('cpu', torch.bfloat16):
        assert_close(ss2d_scan(**inputs, out_dtype=torch.float32, backend='triton'), exact, 1e-5)


def test_nan_stays_in_its_sample():
    inputs = ss2d_scan_inputs(3, 2, 2, 5)
    clean = ss2d_scan(**inputs, backend='triton')
    inputs['x'][1, 0, 1, 2] = torch.nan
    y = ss2d_scan(**inputs, backend='triton')
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1].isnan().any()


# Two of the shapes with every set of absent inputs, the slower ones with all inputs.
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
@pytest.mark.parametrize('shape, absent', [
    *((shape, absent) for shape in ((2, 2, 3, 11, 1), (1, 1, 35, 3, 1))
      for absent in ((), ('D',), ('D', 'delta_bias'))),
    ((1, 4, 2, 9, 3), ()), ((1, 1, 2, 17, 16), ())], ids=str)
def test_selective_scan(shape, absent, softplus):
    inputs = selective_scan_inputs(*shape)
    if not softplus:
        inputs['delta'], inputs['delta_bias'] = inputs['delta'].abs(), inputs['delta_bias'].abs()
    inputs = {name: t for name, t in inputs.items() if name not in absent}
    check(selective_scan, s6_reference, inputs, delta_softplus=softplus)


def test_strides_of_selective_scan():
    inputs = selective_scan_inputs(2, 2, 3, 6, 2)
    turned = {name: t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t
              for name, t in inputs.items()}
    check(selective_scan, s6_reference, turned, delta_softplus=True)


def test_empty_batch():
    inputs = ss2d_scan_inputs(0, 3, 2, 2)
    y, grads = with_grads(ss2d_scan, inputs, backend='triton')
    assert y.shape == (0, 3, 2, 2) and not grads['A'].any()
    inputs = selective_scan_inputs(0, 1, 3, 2, 2)
    y, grads = with_grads(selective_scan, inputs, backend='triton')
    assert y.shape == (0, 3, 2) and not grads['A'].any()


def test_is_not_chosen_for_a_cpu():
    inputs = ss2d_scan_inputs(1, 2, 2, 3)
    assert torch.equal(ss2d_scan(**inputs), ss2d_scan(**inputs, backend='chunked'))
    with pytest.raises(ValueError, match='the kernels take and give float32'):
        ss2d_scan(**{name: t.double() for name, t in inputs.items()}, backend='triton')
