from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.ops import ss2d_scan, ss2d_scan_norm
from vmamba_mm.ops.ss2d_scan import reference
from vmamba_mm.testing import (
    DEVICES,
    assert_close,
    ss2d_scan_inputs,
    with_grads,
)

# (batch, dim, height, width)
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 40), (1, 3, 37, 1), (3, 5, 7, 7), (1, 4, 5, 9), (2, 2, 17, 4)]


def autograd_reference(**inputs):
    """The specification differentiated by autograd: no code of the op's own backward."""
    return reference.forward(*inputs.values(), out_dtype=inputs['x'].dtype)


def check_against_reference(inputs, backend):
    expected, expected_grads = with_grads(autograd_reference, inputs)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        cast = {name: t.to(dtype) for name, t in inputs.items()}
        y, grads = with_grads(ss2d_scan, cast, backend=backend)
        assert y.stride() == cast['x'].stride() and y.dtype == dtype
        assert_close(y, expected, rtol, 'y')
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name], rtol, f'gradient by {name}')


def test_batch_in_several_blocks(monkeypatch):
    from vmamba_mm.ops.ss2d_scan import chunked
    monkeypatch.setattr(chunked, '_BLOCK', 2 * 3 * 4 * 5)
    check_against_reference(ss2d_scan_inputs(5, 3, 4, 5, dtype=torch.float64), 'chunked')


def norm_after_scan(norm_weight, norm_bias, eps, backend, **inputs):
    y = ss2d_scan(**inputs, out_dtype=torch.promote_types(inputs['x'].dtype, norm_weight.dtype),
                  backend=backend)
    y = F.layer_norm(y.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps)
    return y.permute(0, 3, 1, 2).to(inputs['x'].dtype)


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous', 'transposed'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('device', DEVICES)
def test_norm_has_the_strides_of_x(device, dtype, layout, compiled):
    inputs = ss2d_scan_inputs(2, 6, 5, 4, device=device)
    inputs |= dict(norm_weight=torch.rand(6, device=device), norm_bias=inputs['D'][:6].clone())
    x = inputs['x'].to(dtype)
    inputs['x'] = {'channels_last': x, 'contiguous': x.contiguous(),
                   'transposed': x.contiguous().transpose(2, 3).contiguous().transpose(2, 3)
                   }[layout]
    op, expected_op = (partial(f, eps=1e-5, backend='chunked')
                       for f in (ss2d_scan_norm, norm_after_scan))
    if compiled:
        torch._dynamo.reset()
        op = torch.compile(op, fullgraph=True, backend='aot_eager')
    y, grads = with_grads(op, inputs)
    expected, expected_grads = with_grads(expected_op, inputs)
    assert y.dtype == dtype and y.stride() == inputs['x'].stride()
    assert_close(y, expected, 1e-6)
    for name, grad in grads.items():
        assert grad.stride() == inputs[name].stride()
        assert_close(grad, expected_grads[name], 1e-5, name)


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_result_has_the_strides_of_x(layout, backend):
    inputs = ss2d_scan_inputs(2, 6, 5, 4)
    x = inputs['x'].contiguous(memory_format=layout)
    for one in (x, x.transpose(2, 3).contiguous(memory_format=layout).transpose(2, 3)):
        y = ss2d_scan(**dict(inputs, x=one), backend=backend, out_dtype=torch.float64)
        assert y.stride() == one.stride()


@pytest.mark.parametrize('device', DEVICES)
def test_compiles_by_inductor(device):
    inputs = ss2d_scan_inputs(2, 4, 6, 5, device=device)

    def block(x, *weights):
        return ss2d_scan(torch.nn.functional.silu(x), *weights).square()

    compiled = torch.compile(block, fullgraph=True)
    expected, expected_grads = with_grads(lambda **kw: block(*kw.values()), inputs)
    y, grads = with_grads(lambda **kw: compiled(*kw.values()), inputs)
    assert_close(y, expected, 1e-6)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-6, name)


@pytest.mark.parametrize('device', DEVICES)
def test_fp32_parameters_with_half_input(device):
    """What autocast gives the op: half activations, fp32 weights, an fp32 result asked for."""
    inputs = ss2d_scan_inputs(2, 4, 5, 6, device=device)
    inputs['x'] = inputs['x'].bfloat16()
    exact, exact_grads = with_grads(autograd_reference,
                                    {name: t.double() for name, t in inputs.items()})
    with torch.autocast(device, torch.bfloat16):
        y, grads = with_grads(ss2d_scan, inputs, out_dtype=torch.float32, backend='chunked')
    assert y.dtype == torch.float32
    assert_close(y, exact, 1e-5)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close(grad, exact_grads[name], 4e-3 if name == 'x' else 1e-5, name)


def test_never_holds_the_state_of_the_whole_map():
    """For N > 1 no (B, K, D, L, N) tensor, not even one direction's, in forward or backward."""
    batch, dim, side, state = 2, 64, 32, 16
    inputs = ss2d_scan_inputs(batch, dim, side, side, state=state, rank=1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    from vmamba_mm.ops.ss2d_scan import chunked
    with Watch():
        y = chunked.forward(*inputs.values(), torch.float32)
        chunked.backward(torch.ones_like(y), *inputs.values())
    one_direction = batch * dim * side * side
    assert 0 < largest < one_direction * state / 4
