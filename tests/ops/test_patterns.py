"""Scan patterns against loops over positions (scan_by_hand.py), with every gradient."""

import importlib.util
import os
import sys
from contextlib import nullcontext

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulated_gpu
from scan_by_hand import scan_by_hand
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from vmamba_mm.layers import SS2D, VSSBlock
from vmamba_mm.ops import register_scan, scan_norm, scan_patterns, ss2d_scan_norm
from vmamba_mm.ops.ss2d_scan import ordered, patterns
from vmamba_mm.testing import (
    DEVICES,
    assert_close,
    relative_error,
    ss2d_scan_inputs,
    with_grads,
)

PAPERS = ('cross', 'unidirectional', 'bidirectional', 'cascade')
EIGHT = ('omnidirectional', 'omnidirectional-unwrapped')
ALL = pytest.mark.parametrize('scan', [*PAPERS, 'diagonal', *EIGHT])
SIZES = [(1, 1), (1, 12), (11, 1), (5, 7)]
EPS = 1e-3  # not the default, so that it must arrive


def falling(height, width):
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return ((w - h) * height + h).flatten().argsort()


def rising(height, width):
    h, w = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return ((w + h) * height + h).flatten().argsort()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A pattern of our own, and whatever a test registers, for the test alone."""
    monkeypatch.setattr(patterns, '_PATTERNS', dict(patterns._PATTERNS))
    monkeypatch.setattr(patterns, '_ORDERS', dict(patterns._ORDERS))
    monkeypatch.setattr(ordered, 'PATTERNS', dict(ordered.PATTERNS))
    register_scan('diagonal', (falling, rising, lambda h, w: falling(h, w).flip(0),
                               lambda h, w: rising(h, w).tolist()[::-1]))


def make(batch, dim, height, width, dtype=torch.float64, scan='cross', **kwargs):
    kwargs = dict(routes=patterns.num_routes(scan)) | kwargs
    inputs = ss2d_scan_inputs(batch, dim, height, width, dtype=dtype, **kwargs)
    rng = torch.Generator(inputs['x'].device).manual_seed(3)
    norm = torch.rand(2, dim, generator=rng, dtype=dtype, device=inputs['x'].device) + 0.5
    return inputs | dict(norm_weight=norm[0], norm_bias=norm[1])


def by_hand(inputs, scan):
    return with_grads(scan_by_hand, {name: t.double() for name, t in inputs.items()}, eps=EPS,
                      scan=scan)


def check(found, expected, rtol):
    (y, grads), (expected_y, expected_grads) = found, expected
    assert_close(y, expected_y, rtol, 'y')
    for name, grad in grads.items():
        # At 1x1 with one image nothing depends on A: both are 0 but for rounding.
        if expected_grads[name].abs().max() > 1e-12:
            assert_close(grad, expected_grads[name], rtol, f'gradient by {name}')
        else:
            assert grad.abs().max() <= 1e-6, name


@ALL
@pytest.mark.parametrize('state', [1, 3])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)
@pytest.mark.parametrize('device', DEVICES)
def test_outputs_and_every_gradient(device, size, batch, state, scan):
    inputs = make(batch, 6, *size, scan=scan, state=state, device=device)
    expected = by_hand(inputs, scan)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        cast = {name: t.to(dtype) for name, t in inputs.items()}
        y, grads = found = with_grads(scan_norm, cast, eps=EPS, scan=scan)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        check(found, expected, rtol)


@ALL
def test_reference_backend_and_channels_first(scan):
    inputs = make(2, 5, 4, 3, scan=scan, state=2)
    inputs['x'] = inputs['x'].contiguous()
    expected = by_hand(inputs, scan)
    for backend in ('reference', 'chunked'):
        check(with_grads(scan_norm, inputs, eps=EPS, scan=scan, backend=backend), expected, 1e-10)


def test_cross_is_the_op_itself():
    inputs = make(2, 8, 5, 7, torch.float32)
    y, grads = with_grads(scan_norm, inputs)
    expected, expected_grads = with_grads(ss2d_scan_norm, inputs)
    assert torch.equal(y, expected)
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())


@pytest.mark.parametrize(('scan', 'given'), [
    ('unidirectional', ['x', 'x']), ('bidirectional', ['x']), ('cascade', ['copy'] * 4),
    ('diagonal', ['copy'] * 4)])
def test_what_the_op_is_given(monkeypatch, scan, given):
    """The map itself wherever its order in memory will do; at most one copy for a route."""
    inputs, found = make(2, 4, 3, 5), []

    def recorded(op):
        def call(x, *args, **kwargs):
            assert x.is_contiguous(memory_format=torch.channels_last) and x.shape[2] == 1
            assert x.numel() == inputs['x'].numel()
            found.append('x' if x.data_ptr() == inputs['x'].data_ptr() else 'copy')
            return op(x, *args, **kwargs)
        return call

    for op in ('ss2d_scan', 'ss2d_scan_norm'):
        monkeypatch.setattr(patterns, op, recorded(getattr(patterns, op)))
    scan_norm(**inputs, scan=scan)
    assert found == given


ROW, COLUMN, ROW_BACK, COLUMN_BACK = ('row-major', 'column-major', 'reversed row-major',
                                      'reversed column-major')


@pytest.mark.parametrize(('scan', 'routes'), [
    ('cross', (ROW, COLUMN, ROW_BACK, COLUMN_BACK)), ('unidirectional', (ROW,) * 4),
    ('bidirectional', (ROW, ROW, ROW_BACK, ROW_BACK))])
def test_named_routes_make_the_papers_patterns(scan, routes):
    """The paper's own, registered a second time."""
    register_scan('again', routes)
    if scan != 'cross':
        assert patterns._PATTERNS['again'] == patterns._PATTERNS[scan]
    inputs = make(2, 4, 3, 5)
    check(with_grads(scan_norm, inputs, scan='again'), with_grads(scan_norm, inputs, scan=scan),
          1e-12)


def test_routes_take_the_parameters_of_their_k():
    """Two ways in another order of k, and three routes of one order beside one of another."""
    inputs = make(2, 4, 3, 5)
    order = [0, 2, 1, 3]
    mixed = {name: t if name in ('x', 'norm_weight', 'norm_bias') else
             torch.cat([t.chunk(4)[k] for k in order]) for name, t in inputs.items()}
    register_scan('mixed', (ROW, ROW_BACK, ROW, ROW_BACK))
    assert_close(scan_norm(**mixed, scan='mixed'), scan_norm(**inputs, scan='bidirectional'), 1e-12)
    register_scan('three', [falling, rising, falling, falling])
    register_scan('apart', [falling, rising, *(lambda h, w: falling(h, w) for _ in range(2))])
    assert [len(patterns._PATTERNS[name]) for name in ('three', 'apart')] == [2, 4]
    check(with_grads(scan_norm, inputs, scan='three'), with_grads(scan_norm, inputs, scan='apart'),
          1e-12)


@ALL
def test_empty_batch(scan):
    inputs = make(1, 4, 3, 5, scan=scan)
    y, grads = with_grads(scan_norm, dict(inputs, x=inputs['x'][:0]), scan=scan)
    assert y.shape == (0, 4, 3, 5) and grads['x'].shape == y.shape
    assert not any(grad.any() for grad in grads.values())


@ALL
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('device', DEVICES)
def test_half_maps(device, dtype, scan):
    """As under autocast: half activations, fp32 parameters."""
    inputs = make(2, 16, 6, 7, torch.float32, scan, device=device)
    inputs['x'] = inputs['x'].to(dtype)
    expected, expected_grads = by_hand(inputs, scan)
    limit = 0.01 if dtype == torch.float16 else 0.08
    with torch.autocast(device, dtype):
        y, grads = with_grads(scan_norm, inputs, eps=EPS, scan=scan)
    assert y.dtype == dtype and relative_error(y, expected) <= limit
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, expected_grads[name]) <= limit, name


def test_reorder_op():
    x = torch.randn(2, 15, 3, dtype=torch.float64, requires_grad=True)
    for args in ((x, 3, 5, 'diagonal, route 1', False), (x, 5, 3, 'column-major', True)):
        opcheck(torch.ops.vmamba_mm.reorder.default, args)
        assert torch.autograd.gradcheck(lambda x, args=args: patterns.reorder(x, *args[1:]), [x])
    there = patterns.reorder(x, 3, 5, 'column-major', False)
    assert torch.equal(there, x.view(2, 3, 5, 3).transpose(1, 2).flatten(1, 2))
    assert torch.equal(patterns.reorder(there, 3, 5, 'column-major', True), x)


@ALL
def test_flops(scan):
    """Of each pattern the same: a scan and its projections for each route."""
    routes = patterns.num_routes(scan)
    inputs = make(2, 6, 4, 5, scan=scan, state=3)
    with FlopCounterMode(display=False) as counter:
        scan_norm(**inputs, scan=scan)
    projections = 2 * routes * 20 * 6 * (2 + 2 * 3 + 2)
    assert counter.get_total_flops() == 2 * (
        projections + 2 * 20 * 6 * routes * (9 * 3 + 1))
    with FlopCounterMode(display=False) as counter:
        scan_norm(**{name: t.to('meta') for name, t in inputs.items()}, scan=scan)
    assert counter.get_total_flops() == 2 * (
        projections + 2 * 20 * 6 * routes * (9 * 3 + 1))


# --- layers ------------------------------------------------------------------------------------

@ALL
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_ss2d_compiles_as_one_graph(scan, dynamic):
    torch.manual_seed(0)
    layer = SS2D(8, scan=scan)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for size in ((5, 7), (6, 4)) if dynamic else ((5, 7),):
        x = torch.randn(2, *size, 8, requires_grad=True)
        found, expected = ([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
                           for y in (compiled(x), layer(x)))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 1e-5)


@ALL
def test_checkpointed_block(scan):
    torch.manual_seed(0)
    config = dict(mlp_ratio=2.0, drop_path=0.0, ssm_cfg=dict(scan=scan))
    plain, saving = (VSSBlock(8, with_cp=with_cp, **config) for with_cp in (False, True))
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 8)
    for block in (plain, saving):
        block(x).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@ALL
@pytest.mark.parametrize('autocast', [False, True], ids=['pure', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_block(scan, dtype, autocast):
    torch.manual_seed(0)
    block = VSSBlock(16, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg=dict(scan=scan))
    x = torch.randn(2, 5, 4, 16)
    exact = block(x)
    if not autocast:
        block, x = block.to(dtype), x.to(dtype)
    with torch.autocast('cpu', dtype) if autocast else nullcontext():
        y = block(x)
    y.float().square().sum().backward()
    assert y.dtype == (torch.float32 if autocast else dtype)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


def test_patterns_differ():
    """On one set of weights, so that no two names can mean the same."""
    inputs = make(1, 6, 4, 5)
    found = [scan_norm(**inputs, scan=scan) for scan in (*PAPERS, 'diagonal')]
    inputs = make(1, 6, 4, 5, scan='omnidirectional')
    found += [scan_norm(**inputs, scan=scan) for scan in EIGHT]
    for i, one in enumerate(found):
        assert all(relative_error(one, other) > 0.05 for other in found[:i])


# --- errors ------------------------------------------------------------------------------------

def test_names():
    assert scan_patterns() == (*PAPERS, 'diagonal', *EIGHT)
    wrong = "scan='zigzag' does not exist; choose one of .*'cascade', 'diagonal', 'omni"
    with pytest.raises(ValueError, match=wrong):
        scan_norm(**make(1, 4, 3, 3), scan='zigzag')
    with pytest.raises(ValueError, match=wrong):
        SS2D(6, scan='zigzag')


@pytest.mark.parametrize(('name', 'routes', 'message'), [
    ('cross', (ROW,) * 4, "scan 'cross' exists already; choose"),
    ('omnidirectional', (ROW,) * 8, "scan 'omnidirectional' exists already; choose"),
    ('', (ROW,) * 4, 'a str that is not empty'),
    ('new', (ROW,) * 3, 'sequence of 4 or 8 routes'),
    ('new', falling, 'sequence of 4 or 8 routes'),
    ('new', 'abcd', 'sequence of 4 or 8 routes'),
    ('new', (ROW, ROW, ROW, 'spiral'), "route 3 .* is 'spiral'; .*'column-major'"),
    ('new', (ROW, ROW, ROW, 7), 'route 3 .* is 7'),
    ('new', (ROW, lambda h, w: [0] * (h * w), ROW, ROW), '0 to 14 once'),
    ('new', (ROW, lambda h, w: range(h * w - 1), ROW, ROW), '0 to 14 once'),
    ('new', (ROW, lambda h, w: torch.arange(h * w) / 2, ROW, ROW), '0 to 14 once')])
def test_what_cannot_be_registered(name, routes, message):
    before = scan_patterns()
    with pytest.raises(ValueError, match=message):
        register_scan(name, routes)
    assert before == scan_patterns()


def test_orders_found_in_inference_mode_serve_training():
    inputs = make(1, 4, 4, 9)
    with torch.inference_mode():
        y = scan_norm(**inputs, scan='diagonal')
    found, _ = with_grads(scan_norm, inputs, scan='diagonal')
    assert torch.equal(found, y)


def test_eight_registered_routes():
    """The diagonals of the package, written out; a route's parameters are those of its k."""
    register_scan('eight', (ROW, COLUMN, ROW_BACK, COLUMN_BACK, falling, rising,
                            lambda h, w: falling(h, w).flip(0),
                            lambda h, w: rising(h, w).tolist()[::-1]))
    inputs = make(2, 4, 3, 5, scan='eight')
    check(with_grads(scan_norm, inputs, scan='eight'),
          with_grads(scan_norm, inputs, scan='omnidirectional-unwrapped'), 1e-12)
    order = [4, 6, 1, 0, 2, 3, 5, 7]
    mixed = {name: t if name in ('x', 'norm_weight', 'norm_bias') else
             torch.cat([t.chunk(8)[k] for k in order]) for name, t in inputs.items()}
    named = ordered.PATTERNS['eight']
    ordered.PATTERNS['mixed'] = tuple(named[k] for k in order)
    assert_close(scan_norm(**mixed, scan='mixed'), scan_norm(**inputs, scan='eight'), 1e-12)


def test_an_order_is_checked_at_every_size():
    register_scan('some sizes', (lambda h, w: range(15),) * 4)
    with pytest.raises(ValueError, match='0 to 5 once'):
        scan_norm(**make(1, 4, 2, 3), scan='some sizes')
    register_scan('some sizes of eight', (lambda h, w: range(15),) * 8)
    with pytest.raises(ValueError, match='0 to 5 once'):
        scan_norm(**make(1, 4, 2, 3, routes=8), scan='some sizes of eight')


@pytest.mark.parametrize('scan', ['unidirectional', 'diagonal'])
def test_wrong_shapes(scan):
    inputs = make(1, 4, 3, 3)
    with pytest.raises(ValueError, match='expects D of shape'):
        scan_norm(**dict(inputs, D=inputs['D'][:4]), scan=scan)
    two = make(1, 4, 3, 3, routes=2)
    with pytest.raises(ValueError, match=r'K = 4 routes, got x_proj_weight \(2, 4, 4\)'):
        scan_norm(**two, scan=scan)
    with pytest.raises(ValueError, match=r'K = 8 routes, got x_proj_weight \(4, 4, 4\)'):
        scan_norm(**inputs, scan='omnidirectional')


# --- kernels -----------------------------------------------------------------------------------

def check_kernels(inputs, scan, backend):
    """Twice the rounding that plain PyTorch has on the same map."""
    exact, exact_grads = with_grads(
        scan_norm, {name: t.double() for name, t in inputs.items()}, eps=EPS, scan=scan)
    plain, plain_grads = with_grads(scan_norm, inputs, eps=EPS, scan=scan, backend='chunked')
    y, grads = with_grads(scan_norm, inputs, eps=EPS, scan=scan, backend=backend)
    floor = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[inputs['x'].dtype]
    assert y.dtype == inputs['x'].dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, exact) <= 2 * max(floor, relative_error(plain, exact))
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        limit = 2 * max(floor, relative_error(plain_grads[name], exact_grads[name]))
        assert relative_error(grad, exact_grads[name]) <= limit, name


KERNEL_SHAPES = pytest.mark.parametrize('shape', [
    (1, 16, 1, 1), (3, 32, 5, 7), (2, 20, 1, 40), (2, 18, 37, 1), (1, 36, 20, 31)],
    ids='B{0[0]}-D{0[1]}-{0[2]}x{0[3]}'.format)
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16],
                                 ids=['fp32', 'fp16', 'bf16'])


@ALL
@DTYPES
@KERNEL_SHAPES
@pytest.mark.skipif(sys.platform != 'linux'
                    or emulated_cuda.COMPILER is None and not os.environ.get('CI'),
                    reason='needs Linux and a C++ compiler')
def test_emulated_cuda(compiled, shape, dtype, scan):
    inputs = make(*shape, torch.float32, scan, state=1 if dtype != torch.bfloat16 else 4)
    inputs['x'] = inputs['x'].to(dtype)
    with emulated_gpu(compiled):
        check_kernels(inputs, scan, 'cuda')


needs_gpu = pytest.mark.gpu


@ALL
@DTYPES
@pytest.mark.parametrize('state', [1, 4])
@pytest.mark.parametrize('shape', [
    (3, 96, 7, 7), (2, 192, 56, 56), (1, 96, 37, 53), (2, 18, 9, 11)],
    ids='B{0[0]}-D{0[1]}-{0[2]}x{0[3]}'.format)
@pytest.mark.gpu(nvidia=True)
def test_cuda(shape, state, dtype, scan):
    inputs = make(*shape, torch.float32, scan, state=state, device='cuda')
    inputs['x'] = inputs['x'].to(dtype)
    check_kernels(inputs, scan, 'cuda')


@ALL
@DTYPES
@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
def test_triton(dtype, scan):
    inputs = make(2, 18, 9, 11, torch.float32, scan, device='cuda')
    inputs['x'] = inputs['x'].to(dtype)
    check_kernels(inputs, scan, 'triton')


@ALL
@needs_gpu
def test_training_step_on_a_gpu(scan):
    """A block under autocast, eager and compiled, is the one in fp64; runs are bit-equal."""
    torch.manual_seed(0)
    block = VSSBlock(32, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg=dict(scan=scan))
    block, x = block.cuda(), torch.randn(2, 9, 14, 32, device='cuda')

    def step(run, x, half=True):
        with torch.autocast('cuda', torch.float16, enabled=half):
            y = run(x)
        # A sum: gradients of a mean are too small for fp16.
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), block.parameters())]

    found, again = step(block, x), step(block, x)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    torch._dynamo.reset()
    compiled = step(torch.compile(block, fullgraph=True), x)
    exact = step(block.double(), x.double(), half=False)
    for one, other, true in zip(found, compiled, exact, strict=True):
        assert relative_error(one, true) <= 0.02 and relative_error(other, true) <= 0.02
