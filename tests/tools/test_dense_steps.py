"""tools/bench/dense_steps.py on a CPU, at a small part of the size."""

import csv
import logging
import sys
from pathlib import Path

import pytest
import torch

from vmamba_mm.errors import UserError

BENCH = Path(__file__).parents[2] / 'tools' / 'bench'
ON_CPU = ('--device', 'cpu', '--shrink', 16, '--quick')


@pytest.fixture
def tool(monkeypatch, load_tool):
    """dense_steps; call(*argv) runs its main."""
    for package in ('timm', 'mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    dense_steps = load_tool('bench/dense_steps.py')
    from mmengine.logging import MMLogger

    def call(*argv):
        monkeypatch.setattr(sys, 'argv', ['dense_steps.py', *map(str, argv)])
        dense_steps.main()

    monkeypatch.setattr(dense_steps, 'call', call, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    logger, threads = MMLogger.get_current_instance(), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)  # the maps are small
    yield dense_steps
    torch.set_num_threads(threads)
    logger.setLevel(level if level != logging.NOTSET else logging.INFO)


def test_steps(tool, monkeypatch, tmp_path, capsys):
    make = tool.make_config

    def make_or_fail(task, name, side_by):
        if name == 'swin_t':
            raise RuntimeError('this one\nfails')
        return make(task, name, side_by)

    monkeypatch.setattr(tool, 'make_config', make_or_fail)
    path = tmp_path / 'a.csv'
    tool.call(*ON_CPU, '--tasks', 'upernet', '--csv', path)
    out = capsys.readouterr().out
    ratios, steps, checks, missing = (out.index(text) for text in (
        'ms/ConvNeXt-T', 'official', 'Checked before', 'Not measured'))
    assert ratios < steps < checks < missing
    assert out[missing:].count('swin_t: UperNet 512x512 b4, fp') == 2
    assert 'RuntimeError: this one fails' in out[missing:]
    assert 'no verdicts' in out and 'MISSED' not in out and 'met' not in out.split()

    lines = list(csv.DictReader(path.open()))
    assert [(line['model'], line['precision']) for line in lines] == [
        (model, precision) for model in tool.MODELS for precision in ('fp32', 'fp16')]
    for line in lines:
        if line['model'] == 'swin_t':
            assert line['problem'] and line['ms'] == 'nan'
            continue
        assert not line['problem'] and float(line['ms']) > 0
        assert 5 < float(line['loss']) < 10  # ln 150 and 0.4 of it
        if line['precision'] == 'fp16':
            assert float(line['loss_error']) < 1e-2
        ours = line['model'] == 'tiny_s1l8'
        limits = (1e-5, 1e-5) if line['precision'] == 'fp32' else (6e-2, 0.15)
        assert (0 <= float(line['error']) < limits[0]) == ours
        assert (0 <= float(line['grad_error']) < limits[1]) == ours

    tool.call('--merge', path, '--csv', tmp_path / 'b.csv')
    assert capsys.readouterr().out.splitlines()[3:] == out.splitlines()[4:]
    assert (tmp_path / 'b.csv').read_text() == path.read_text()


@pytest.mark.slow
def test_detection(tool, tmp_path, capsys):
    tool.call(*ON_CPU, '--tasks', 'mask-rcnn', '--models', 'tiny_s1l8', 'swin_t', '--csv',
              tmp_path / 'a.csv')
    lines = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert [(line['task'], line['precision']) for line in lines] == 2 * [
        ('mask-rcnn', 'fp32'), ('mask-rcnn', 'fp16'), ('backbone', 'fp16')]
    assert all(float(line['ms']) > 0 for line in lines)
    assert 'backbone forward 800x1280 b1, fp16' in capsys.readouterr().out


def test_annotations_are_plausible(tool):
    tool.prepare_mm()
    rng = tool.np.random.default_rng(0)
    found = tool.make_detection(rng, 160, 256).gt_instances
    assert found.masks.masks.shape == (tool.OBJECTS, 160, 256)
    assert (found.bboxes >= 0).all() and (found.bboxes <= torch.tensor([256, 160, 256, 160])).all()
    for mask, (left, top, right, bottom) in zip(found.masks.masks, found.bboxes.tolist(),
                                                strict=True):
        area = (right - left) * (bottom - top)
        assert mask.sum() == pytest.approx(0.785 * area, rel=0.15, abs=12)
    labels = tool.make_segmentation(rng, 160, 256).gt_sem_seg.data
    assert labels.shape == (1, 160, 256) and labels.unique().numel() > 20
    assert set(labels.unique().tolist()) - {255} < set(range(150))


@pytest.mark.parametrize('what', ['maps', 'gradient'])
def test_what_is_wrong_is_not_timed(tool, monkeypatch, tmp_path, what):
    """A kernel that is wrong under autocast only, forward or backward."""
    import vmamba_mm.layers.ss2d as layer

    right = layer.scan_norm

    def wrong(x, *args, **kwargs):
        y = right(x, *args, **kwargs)
        if x.dtype == torch.float32:
            return y
        return y * 1.5 if what == 'maps' else y.detach() + 0 * x

    monkeypatch.setattr(layer, 'scan_norm', wrong)
    found = "the backbone's maps are" if what == 'maps' else '(no gradient|gradient is)'
    with pytest.raises(UserError, match=f'tiny_s1l8 is wrong.*fp16: .*{found}'):
        tool.call(*ON_CPU, '--tasks', 'upernet', '--csv', tmp_path / 'a.csv')
    assert not (tmp_path / 'a.csv').exists()


def test_our_failure_is_an_error(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'make_config', lambda *args: 1 / 0)
    with pytest.raises(UserError, match='tiny_s1l8 failed'):
        tool.call(*ON_CPU, '--tasks', 'upernet', '--models', 'tiny_s1l8')
    assert 'tiny_s1l8: UperNet 512x512 b4, fp32: ZeroDivisionError' in capsys.readouterr().out


def make_rows(tool, ms, peaks):
    """Of UperNet in fp32: ours, Swin-T and ConvNeXt-T."""
    rows = {tool.Case(model, 'upernet'): dict(ms=time, peak_gib=peak)
            for model, time, peak in zip(tool.MODELS, ms, peaks, strict=True)}
    return {case: dict.fromkeys(tool.NUMBERS, tool.NAN) | row for case, row in rows.items()}


@pytest.mark.parametrize(('ms', 'peaks', 'relative', 'absolute'), [
    ((120.0, 150.0, 124.0), (7.0, 7.2, 7.0), ['met', 'met'], ['met', 'met']),
    # A slow CPU: what counts is the ratio.
    ((150.0, 180.0, 151.0), (7.8, 7.2, 7.0), ['met', 'MISSED'], ['MISSED', 'MISSED']),
    ((110.0, 100.0, 100.0), (7.6, 7.2, 7.0), ['MISSED', 'met'], ['met', 'met']),
    # Nothing is said of what was not measured.
    ((110.0, 100.0, float('nan')), (7.6, 7.2, float('nan')), [], ['met'])])
def test_verdicts(tool, capsys, ms, peaks, relative, absolute):
    def verdicts():
        return [word for word in capsys.readouterr().out.split() if word in ('met', 'MISSED')]

    report, rows = tool.report, make_rows(tool, ms, peaks)
    h100 = dict(device='NVIDIA H100 80GB HBM3', shrink='1')
    for setting, expected in ((h100, (relative, absolute)),
                              (h100 | dict(device='NVIDIA H200'), (relative, [])),
                              (h100 | dict(shrink='2'), ([], [])),
                              (h100 | dict(device='CPU'), ([], []))):
        report.print_ratios(rows, setting)
        assert verdicts() == expected[0]
        report.print_requirements(rows, setting)
        assert verdicts() == expected[1]


def test_requirements(tool):
    """Those of the issue: ms at most, and ConvNeXt-T's anchors."""
    assert {(need.task, need.precision): (need.required_ms, need.ms[2])
            for need in tool.report.REQUIREMENTS[:4]} == {
        ('mask-rcnn', 'fp32'): (185, 185), ('mask-rcnn', 'fp16'): (190, 197),
        ('upernet', 'fp32'): (125, 125), ('upernet', 'fp16'): (115, 119)}
    assert tool.report.REQUIREMENTS[1].ratio == pytest.approx(190 / 197)


def test_profile_is_shown(tool, capsys):
    rows = make_rows(tool, (120.0, 150.0, 124.0), (7.0, 7.2, 7.0))
    for row in rows.values():
        row |= dict(problem='', kernels_ms=100.0, backbone_kernels_ms=25.0)
    tool.report.print_rows(rows)
    shown = [line.split()[-5:] for line in capsys.readouterr().out.splitlines()
             if line.startswith('tiny_s1l8')]
    assert shown[-1] == ['120', '100', '25', '75', '25']


def test_mistakes(tool, tmp_path):
    for argv, match in ((('--shrink', 0), 'at least 1'),
                        (('--merge', tmp_path / 'none.csv'), 'none.csv'),
                        (('--merge', __file__), 'no CSV file of this tool')):
        with pytest.raises((UserError, FileNotFoundError), match=match):
            tool.call(*argv)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='finds no GPU'):
            tool.call()
    with pytest.raises(SystemExit):
        tool.call('--tasks', 'none')
