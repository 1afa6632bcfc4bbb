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
                  str(HERE / 'interpreted_triton.py'), str(HERE / 'test_ops.py'), '-k',
                  'not gradcheck', TRITON_INTERPRET='1',
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


def check(op, exact, inputs, **kwargs):
    expected, expected_grads = with_grads(
        exact, {name: t.double() for name, t in inputs.items()})
    y, grads = with_grads(op, inputs, backend='triton', **kwargs)
    assert_close(y, expected, 1e-5, 'y')
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-5, f'gradient by {name}')
    return y, grads


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
def test_bit_equal_from_run_to_run_on_gpu():
    inputs = on_gpu(ss2d_scan_inputs(2, 96, 57, 45, rank=6))
    y, grads = with_grads(ss2d_scan, inputs, backend='triton')
    for _ in range(3):
        again, grads_again = with_grads(ss2d_scan, inputs, backend='triton')
        assert torch.equal(y, again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
