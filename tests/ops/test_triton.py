"""The Triton kernels: in the interpreter everywhere, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmamba_mm.ops import selective_scan, ss2d_scan
from vmamba_mm.testing import (
    assert_close,
    relative_error,
    selective_scan_inputs,
    ss2d_scan_inputs,
    with_grads,
)

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None,
                                  reason='triton is not installed (it is for Linux)')


def needs_gpu(test):
    return pytest.mark.gpu(needs_triton(test))


def python(*argv, **env):
    """A process of its own, for what must be set before triton is imported."""
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env})


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    done = python('-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                  str(HERE / 'interpreted_triton.py'), TRITON_INTERPRET='1',
                  CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert ' passed' in done.stdout


def test_importing_the_ops_imports_no_kernels():
    """Triton takes a second to load and reads TRITON_INTERPRET then. (torch may load it itself.)"""
    done = python('-c', 'import sys, vmamba_mm.ops\n'
                  'print("vmamba_mm.ops.scan_kernels.triton_kernels" in sys.modules)')
    assert done.stdout.strip() == 'False', done.stderr


def test_runs_without_triton():
    """Where triton is not installed: said by name, and another implementation is chosen."""
    done = python('-c', 'import importlib.util, sys\n'
                  'find = importlib.util.find_spec\n'
                  'importlib.util.find_spec = lambda name, *a: '
                  'None if name == "triton" else find(name, *a)\n'
                  'from vmamba_mm.ops import ss2d_scan\n'
                  'from vmamba_mm.testing import ss2d_scan_inputs\n'
                  'inputs = ss2d_scan_inputs(1, 2, 2, 2)\n'
                  'ss2d_scan(**inputs)\n'
                  'ss2d_scan(**inputs, backend="triton")', TRITON_INTERPRET='1')
    assert 'ValueError' in done.stderr and 'triton is not installed' in done.stderr


def test_reasons_against():
    inputs = ss2d_scan_inputs(1, 2, 2, 2)
    with pytest.raises(ValueError, match="'triton' does not take.*x is on cpu, not on a GPU"):
        ss2d_scan(**inputs, backend='triton')
    with pytest.raises(ValueError, match="'triton' does not take.*x is on cpu, not on a GPU"):
        selective_scan(**selective_scan_inputs(1, 1, 2, 2, 1), backend='triton')


# --- on a GPU -------------------------------------------------------------------------------

def on_gpu(inputs, dtype=torch.float32):
    """fp32 inputs, the map in ``dtype``, its memory as it was."""
    first, *others = inputs
    return {first: inputs[first].to('cuda', dtype),
            **{name: inputs[name].to('cuda') for name in others}}


def exact_ss2d(**inputs):
    return ss2d_scan(**inputs, backend='chunked')


def exact_s6(**inputs):
    return selective_scan(**inputs, delta_softplus=True, backend='chunked')


def check(op, exact, inputs, **kwargs):
    expected, expected_grads = with_grads(
        exact, {name: t.double() for name, t in inputs.items()})
    y, grads = with_grads(op, inputs, backend='triton', **kwargs)
    assert_close(y, expected, 1e-5, 'y')
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-5, f'gradient by {name}')
    return y, grads


@needs_gpu
@pytest.mark.parametrize('shape, sizes', [
    ((3, 96, 56, 56), dict(rank=6)),
    ((1, 96, 200, 336), dict(rank=6)),
    ((1, 100, 37, 53), dict(state=4, rank=9)),
    ((2, 192, 28, 28), dict(state=16, rank=12)),
    ((1, 20, 9, 11), dict(state=64, routes=2)),
    ((40, 768, 7, 7), dict(rank=48)),
    ((2, 5, 1, 40), dict(routes=1)),
], ids=str)
def test_ss2d_scan_on_gpu(shape, sizes):
    inputs = on_gpu(ss2d_scan_inputs(*shape, **sizes))
    y, _ = check(ss2d_scan, exact_ss2d, inputs)
    assert y.stride() == inputs['x'].stride()


@needs_gpu
def test_strides_on_gpu():
    inputs = on_gpu(ss2d_scan_inputs(2, 32, 9, 14))
    x = inputs['x']
    turned = x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    for other in (x.contiguous(), turned, torch.cat([x, x], dim=1)[:, 31:63]):
        check(ss2d_scan, exact_ss2d, dict(inputs, x=other))


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision_on_gpu(dtype):
    """What autocast gives the op: a half map, fp32 parameters."""
    inputs = on_gpu(ss2d_scan_inputs(2, 32, 9, 14), dtype)
    exact, exact_grads = with_grads(
        exact_ss2d, {name: t.double() for name, t in inputs.items()})
    naive, naive_grads = with_grads(ss2d_scan, inputs, backend='reference')
    y, grads = with_grads(ss2d_scan, inputs, backend='triton')
    assert y.dtype == dtype
    assert relative_error(y, exact) <= 2 * relative_error(naive, exact)
    for name, grad in grads.items():
        limit = max(1e-5, 2 * relative_error(naive_grads[name], exact_grads[name]))
        assert relative_error(grad, exact_grads[name]) <= limit, name
    y32 = ss2d_scan(**inputs, out_dtype=torch.float32, backend='triton')
    assert_close(y32, exact, 1e-5)


@needs_gpu
@pytest.mark.parametrize('bias', [-40., 20., 1e3])
def test_extreme_delta_on_gpu(bias):
    inputs = on_gpu(ss2d_scan_inputs(2, 32, 9, 14))
    inputs['dt_projs_bias'].fill_(bias)
    expected, expected_grads = with_grads(
        exact_ss2d, {name: t.double() for name, t in inputs.items()})
    y, grads = with_grads(ss2d_scan, inputs, backend='triton')
    assert_close(y, expected, 1e-5)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 2e-5, name)


@needs_gpu
def test_nan_stays_in_its_sample_on_gpu():
    inputs = on_gpu(ss2d_scan_inputs(30, 32, 7, 7))
    clean = ss2d_scan(**inputs, backend='triton')
    inputs['x'][1, 0, 2, 2] = torch.nan
    y = ss2d_scan(**inputs, backend='triton')
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2:], clean[2:]) and y[1].isnan().any()


@needs_gpu
@pytest.mark.parametrize('shape', [(1, 1, 1, 1, 1), (2, 4, 96, 196, 1), (1, 2, 130, 301, 16)],
                         ids=str)
def test_selective_scan_on_gpu(shape):
    inputs = on_gpu(selective_scan_inputs(*shape))
    check(selective_scan, exact_s6, inputs, delta_softplus=True)


@needs_gpu
def test_bit_equal_from_run_to_run_on_gpu():
    inputs = on_gpu(ss2d_scan_inputs(2, 96, 57, 45, rank=6))
    y, grads = with_grads(ss2d_scan, inputs, backend='triton')
    for _ in range(3):
        again, grads_again = with_grads(ss2d_scan, inputs, backend='triton')
        assert torch.equal(y, again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@needs_gpu
def test_compiles_as_one_graph_on_gpu():
    inputs = on_gpu(ss2d_scan_inputs(2, 32, 9, 14))
    expected, expected_grads = with_grads(ss2d_scan, inputs, backend='triton')
    compiled = torch.compile(lambda *args: ss2d_scan(*args, backend='triton'), fullgraph=True)
    y, grads = with_grads(lambda **kw: compiled(*kw.values()), inputs)
    assert torch.equal(y, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)
