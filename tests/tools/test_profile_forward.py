"""tools/bench/profile_forward.py: which kind a kernel is of, and the tables, from known times."""

import csv
import functools
import sys

import pytest
import torch
from test_end_to_end import ARCH
from test_tools_errors import assert_one_line

TOOL = 'bench/profile_forward.py'
# As an H100 reports them.
NAMES = {
    'void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::'
    'float16_copy_kernel_cuda(at::TensorIteratorBase&)': 'copies, casts, layout',
    'void at::native::vectorized_elementwise_kernel<8, at::native::float16_copy_kernel_cuda':
        'copies, casts, layout',
    'Memcpy DtoD (Device -> Device)': 'copies, casts, layout',
    'void cast<Half>(Params)': 'parameters prepared',
    'void ss2d_prepare<Half>(Params)': 'parameters prepared',
    'void ss2d_scan_fwd<Half, 3>(Params)': 'scan',
    'void ss2d_scan_chained<Half, 1>(Params)': 'scan',
    'void ss2d_merge<Half, 4, false, 1, false>(Params)': 'merge and norm of the scan',
    'void add_norm<Float, Half, Half, true, 1>(Params)': 'norms and residual sums',
    'void dwconv<Half, true, 2>(Params)': 'depthwise convolution',
    'sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize': 'convolutions',
    'nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNN': 'matrix products, attention',
    'void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(':
        'elementwise',
    'void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<':
        'elementwise',
    'Memset (Device)': 'memory set',
    'something_else': 'other'}


@pytest.fixture
def tool(load_tool):
    pytest.importorskip('timm')
    return load_tool('bench/profile_forward.py')


def test_kinds(tool):
    assert {name: tool.kind_of(name) for name in NAMES} == NAMES


def test_tables(tool, capsys):
    copy, scan, norm = list(NAMES)[0], 'void ss2d_scan_fwd<Half, 3>(Params)', 'void add_norm<1>'
    first = {copy: (10.0, 2), scan: (600.0, 8), norm: (390.0, 3)}
    second = {copy: (25.0, 2), scan: (1200.0, 8), norm: (775.0, 3)}
    cases = [tool.Case('tiny_s1l8', batch=2, height=32, width=32),
             tool.Case('tiny_s1l8', batch=1, height=64, width=64)]
    tool.show(cases[0], first, least=0.05)
    tool.show(cases[1], second, least=0.0)
    shown = capsys.readouterr().out
    assert 'copies, casts, layout: 1.00%\n' in shown
    assert 'copies, casts, layout: 1.25%\n' in shown
    assert shown.count('float16_copy') == 1 and '60.0%  ss2d_scan_fwd<Half, 3>(Params)' in shown
    tool.show_kinds(dict(zip(cases, (first, second), strict=True)))
    lines = {line[:28].strip(): line[28:].split()
             for line in capsys.readouterr().out.splitlines()[2:]}
    assert lines['scan'] == ['292.969', '1.00x', '292.969', '1.00x']
    assert lines['copies, casts, layout'] == ['4.883', '1.00x', '6.104', '1.25x']
    assert lines['all'] == ['488.281', '1.00x', '488.281', '1.00x']
    assert 'merge and norm of the scan' not in lines


def test_a_run_on_a_cpu(tool, monkeypatch, tmp_path, capsys):
    """Of a small model in the place of the published one, whose scans are 100,000 operators."""
    make = functools.partial(tool.end_to_end.vmamba_mm.timm.TimmVMamba, ARCH, num_classes=10)
    monkeypatch.setattr(tool.end_to_end, 'make_model', lambda *args: make())
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # put back afterwards
    monkeypatch.setattr(sys, 'argv', [TOOL, '--device', 'cpu', '--batch', '1', '--size', '32',
                                      '--csv', str(tmp_path / 'k.csv')])
    tool.main()
    printed = capsys.readouterr().out
    assert 'ns by pixel' in printed and 'vmamba_mm::ss2d_scan_fwd' in printed
    with open(tmp_path / 'k.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['kind'] for row in rows} >= {'scan', 'matrix products, attention'}
    assert all(float(row['us']) >= 0 and row['height'] == '32' for row in rows)


def test_mistakes(call):
    assert_one_line(call(TOOL, '--device', 'cpu', '--batch', 1, 2, '--size', 32), 'as many')
    assert_one_line(call(TOOL, '--device', 'cpu', '--batch', 1, '--size', 33), 'multiple of 32')
