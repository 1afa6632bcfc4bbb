"""What is special about ordered_scan: its orders, spans of its kernels, maps of any strides."""

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulated_gpu
from scan_by_hand import paths

from vmamba_mm.ops import ordered_scan, scan_positions
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.scan_kernels import cuda as launches
from vmamba_mm.ops.ss2d_scan import ordered
from vmamba_mm.testing import assert_close, relative_error, ss2d_scan_inputs, with_grads

SCANS = tuple(ordered.PATTERNS)


@pytest.mark.parametrize('scan', SCANS)
@pytest.mark.parametrize('size', [(1, 1), (1, 6), (7, 1), (3, 5), (11, 3)])
def test_orders(scan, size):
    """Taller than wide, diagonals wrap around several times."""
    expected = [[h * size[1] + w for h, w in path] for path in paths(scan, *size)]
    assert scan_positions(scan, *size).tolist() == expected


def test_positions_are_the_callers_own():
    first = scan_positions(SCANS[0], 3, 4)
    first.zero_()
    assert scan_positions(SCANS[0], 3, 4).any()
    with pytest.raises(ValueError, match="scan='cross' does not exist; choose one of .*register"):
        scan_positions('cross', 3, 4)


def on_gpu(compiled):
    """The kernels on the CPU."""
    if emulated_cuda.IS_MISSING:
        pytest.skip('needs Linux and a C++ compiler')
    return emulated_gpu(compiled)


def check(inputs, scan=SCANS[0], limit=2e-5):
    exact, exact_grads = with_grads(
        ordered_scan, {k: t.double() for k, t in inputs.items()}, scan=scan, backend='chunked')
    y, grads = with_grads(ordered_scan, inputs, scan=scan, backend='cuda')
    assert y.stride() == torch.empty_like(inputs['x']).stride()
    assert relative_error(y, exact) <= limit
    for name, grad in grads.items():
        assert relative_error(grad, exact_grads[name]) <= 10 * limit, name


@pytest.fixture
def divided(monkeypatch):
    """Every scan is divided into spans, between which states and gradients are handed on."""
    monkeypatch.setattr(launches.Scans, 'max_span', 48)
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize('state', [1, 16, 20])
@pytest.mark.parametrize('scan', SCANS)
def test_spans(compiled, divided, scan, state):
    """Of 48 positions, of one group of states and of two."""
    with on_gpu(compiled):
        check(ss2d_scan_inputs(2, 12, 13, 9, state=state, routes=8, rank=3), scan)


def test_strides(compiled):
    """Channels first, columns first, rows with gaps between them."""
    inputs = ss2d_scan_inputs(2, 8, 6, 5, state=4, routes=8)
    x = inputs['x']
    turned = x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    gaps = torch.zeros(2, 8, 6, 9).contiguous(memory_format=torch.channels_last)
    gaps[..., :5] = x
    with on_gpu(compiled):
        y = ordered_scan(**inputs, scan=SCANS[0], backend='cuda')
        for other in (x.contiguous(), turned, gaps[..., :5]):
            check(dict(inputs, x=other))
            found = ordered_scan(**dict(inputs, x=other), scan=SCANS[0], backend='cuda')
            assert_close(found, y, 1e-6)


def test_kernels_gather_nothing(compiled, monkeypatch):
    """By default they take the inputs, and without a map in another order."""
    inputs = ss2d_scan_inputs(1, 8, 4, 5, state=4, routes=8)
    monkeypatch.setattr(ordered, '_gather', None)
    with on_gpu(compiled):
        y, _ = with_grads(ordered_scan, inputs, scan=SCANS[0])
    monkeypatch.undo()
    assert_close(y, ordered_scan(**inputs, scan=SCANS[0], backend='chunked'), 1e-5)
