"""tools/bench/dense_steps.py on a CPU, at a small part of the size."""

import csv
import logging
import sys

import pytest
import torch

from vmamba_mm.errors import UserError

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
        'ms/ConvNeXt-T', 'measured by us', 'Checked before', 'Not measured'))
    assert ratios < steps < checks < missing
    assert 'swin_t: RuntimeError: this one fails' in out[missing:]

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
    tool.prepare_packages()
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
def test_what_is_wrong_is_not_timed(tool, break_scan, tmp_path, what):
    break_scan(forward=what == 'maps')
    found = "the backbone's maps are" if what == 'maps' else '(no gradient|gradient is)'
    with pytest.raises(UserError, match=f'tiny_s1l8 is wrong.*fp16: .*{found}'):
        tool.call(*ON_CPU, '--tasks', 'upernet', '--csv', tmp_path / 'a.csv')
    assert not (tmp_path / 'a.csv').exists()


def test_our_failure_is_an_error(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'make_config', lambda *args: 1 / 0)
    with pytest.raises(UserError, match='tiny_s1l8 failed'):
        tool.call(*ON_CPU, '--tasks', 'upernet', '--models', 'tiny_s1l8')
    assert 'tiny_s1l8: ZeroDivisionError' in capsys.readouterr().out


def make_rows(tool, ms, peaks):
    """Of UperNet in fp32: ours, Swin-T and ConvNeXt-T."""
    rows = {tool.Case(model, 'upernet'): dict(ms=time, peak_gib=peak)
            for model, time, peak in zip(tool.MODELS, ms, peaks, strict=True)}
    return {case: dict.fromkeys(tool.NUMBERS, tool.NAN) | row for case, row in rows.items()}


def test_ratios_and_anchors(tool, capsys):
    nan = tool.NAN
    rows = make_rows(tool, (120.0, 150.0, 125.0), (7.0, 7.2, 7.0))
    tool.report.print_ratios(rows)
    tool.report.print_anchors(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()
             if line.startswith('UperNet')]
    assert [line[4:] for line in lines] == [
        ['0.960', '0.800', '1.000', '0.972'],
        ['ms', '120', '150', '125', '|', '174', '154', '125'],
        ['peak', 'GiB', '7', '7.2', '7', '|', '8.17', '7.18', '7.06']]
    # Nothing is said of what was not measured.
    tool.report.print_ratios(make_rows(tool, (120.0, nan, nan), (7.0, nan, nan)))
    assert not capsys.readouterr().out


def test_profile_is_shown(tool, capsys):
    rows = make_rows(tool, (120.0, 150.0, 124.0), (7.0, 7.2, 7.0))
    for row in rows.values():
        row |= dict(problem='', kernels_ms=100.0, backbone_kernels_ms=25.0)
    tool.report.print_rows(rows)
    shown = [line.split()[-5:] for line in capsys.readouterr().out.splitlines()
             if line.startswith('tiny_s1l8')]
    assert shown[-1] == ['120', '100', '25', '75', '25']
