"""tools/bench/scaling.py with two processes on a CPU, joined by gloo."""

import csv
import subprocess
import sys

import pytest
import tiny

SCALING = tiny.TOOLS / 'bench' / 'scaling.py'


def scale(*argv):
    return subprocess.run(
        [sys.executable, SCALING, '--device', 'cpu', '--shrink', '16', '--quick', *map(str, argv)],
        capture_output=True, text=True, timeout=600)


def test_two_processes(tmp_path):
    for package in ('timm', 'mmdet', 'mmpretrain'):
        pytest.importorskip(package)
    path = tmp_path / 'scaling.csv'
    done = scale('--ways', 'eager', '--gpus', 2, '--csv', path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row['task']: row for row in csv.DictReader(path.open())}
    assert set(rows) == {'cls', 'mask-rcnn', 'fsdp'}
    for task, row in rows.items():
        assert 0 < float(row['grad_error']) < 1e-4, task
        assert float(row['alone_ms']) > 0, task
        assert float(row['images_s']) == pytest.approx(4 / float(row['ms']) * 1e3), task


def test_efficiency(load_tool, capsys):
    pytest.importorskip('mmdet')
    tool = load_tool('bench/scaling.py')
    row = dict(ms=10.0, alone_ms=10.5, images_s=100.0, peak_gib=1.0, grad_error=1e-6, problem='')
    tool.print_report({tool.Case('cls'): row,
                       tool.Case('cls', gpus=2): dict(row, ms=11.0, images_s=182.0)})
    single, double = capsys.readouterr().out.splitlines()[-2:]
    assert single.split()[:4] == ['eager', '1', '10.0', '100']
    assert double.split()[:6] == ['eager', '2', '11.0', '10.5', '182', '0.910']


def test_more_gpus_than_there_are(load_tool, monkeypatch):
    pytest.importorskip('mmdet')
    from vmamba_mm.errors import UserError

    tool = load_tool('bench/scaling.py')
    monkeypatch.setattr(tool.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(tool.torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(sys, 'argv', ['scaling.py', '--gpus', '1', '2'])
    with pytest.raises(UserError, match='asks for 2 GPUs, torch finds 1'):
        tool.main()


def test_parameters_that_differ_or_stay_are_found(load_tool, monkeypatch):
    pytest.importorskip('mmdet')
    import torch

    from vmamba_mm.errors import UserError

    tool = load_tool('bench/scaling.py')
    subject = type('Subject', (), dict(model=torch.nn.Linear(2, 1, bias=False)))
    start = subject.model.weight.detach().flatten().clone()
    monkeypatch.setattr(tool.dist, 'all_reduce', lambda tensor, op: None)
    monkeypatch.setattr(tool.dist, 'broadcast', lambda tensor, source: None)
    with pytest.raises(UserError, match='no step has moved'):
        tool.check_parameters(subject, start)
    with torch.no_grad():
        subject.model.weight.add_(1)
    tool.check_parameters(subject, start)
    monkeypatch.setattr(tool.dist, 'broadcast', lambda tensor, source: tensor.add_(1e-3))
    with pytest.raises(UserError, match='differ between the processes'):
        tool.check_parameters(subject, start)
