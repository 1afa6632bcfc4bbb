"""tools/bench/vim_sizes.py: a run on a CPU, and what it says of speeds that are made up."""

import csv
import math
import sys

import pytest
import torch

from vmamba_mm.errors import UserError


@pytest.fixture
def tool(load_tool, monkeypatch):
    pytest.importorskip('timm')
    pytest.importorskip('mmengine')
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # put back afterwards
    return load_tool('bench/vim_sizes.py')


def call(tool, monkeypatch, *argv):
    tool.bench.make_subject.cache_clear()
    monkeypatch.setattr(sys, 'argv', ['vim_sizes.py', *map(str, argv)])
    tool.main()


def made_up(tool, **exponents):
    """Rows of models whose pixels take side ** exponent times as long as at 224, and memory."""
    nothing = dict.fromkeys(tool.report.NUMBERS, tool.NAN)
    return {tool.case_of(model, 'inference', side): {
        **nothing, 'problem': '', 'images_per_s': speed * (224 / side) ** (2 + exponent),
        'peak_gib': (side / 224) ** (2 * exponent), 'ms': 1.0}
        for model, (speed, exponent) in exponents.items() for side in tool.SIDES}


def test_run_on_a_cpu(tool, monkeypatch, tmp_path, capsys):
    from vim_models import VimClassifier

    make = tool.bench.make_model
    monkeypatch.setattr(tool.bench, 'make_model', lambda name, output, *size: VimClassifier(
        dict(base='tiny', depth=2, image_size=size)) if name == 'vim_tiny' else make(
            name, output, *size))
    path, picture = tmp_path / 'a.csv', tmp_path / 'a.png'
    call(tool, monkeypatch, '--device', 'cpu', '--shrink', 16, '--quick', '--dtype', 'bfloat16',
         '--models', 'vim_tiny', 'plain_deit_t', '--sides', 224, 1248, '--csv', path, '--png',
         picture)
    out = capsys.readouterr().out
    lines = list(csv.DictReader(path.open()))
    assert [(line['model'], line['height'], line['batch']) for line in lines] == [
        (model, side, batch) for side, batch in (('224', '128'), ('1248', '4'))
        for model in ('vim_tiny', 'plain_deit_t')]
    assert [0 < float(line['error']) < 6e-2 for line in lines] == [True, False] * 2
    assert '1248x1248, batch 4' in out and 'Vim-T: DeiT-T, attention in memory' in out
    assert picture.read_bytes().startswith(b'\x89PNG')
    call(tool, monkeypatch, '--merge', path)
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[2:]


def test_crossings_and_the_claim(tool, capsys, tmp_path):
    # Equal at 448, where twice the side has cost half the speed; the other is never reached.
    rows = made_up(tool, vim_tiny=(100, 0), plain_deit_t=(200, 1), deit_t=(1000, 0.1))
    tool.print_report(rows, 'inference')
    out = capsys.readouterr().out
    assert out.splitlines()[-4].split()[-1] == '-'
    assert out.splitlines()[-3].split()[-1] == '448'
    claim = next(line for line in out.splitlines() if line.startswith('Vim-T: DeiT-T, attention'))
    speed, saved = claim.split()[-2:]
    assert float(speed) == pytest.approx(1248 / 448, abs=0.01)
    assert float(saved) == pytest.approx(100 * (1 - (224 / 1248) ** 2), abs=0.1)
    tool.plot(rows, tmp_path / 'a.png', 'made up', 'inference')
    assert len((tmp_path / 'a.png').read_bytes()) > 30_000
    with pytest.raises(UserError, match='nothing to draw'):
        tool.plot({}, tmp_path / 'b.png', 'made up', 'inference')


def test_crossing(tool):
    assert tool.crossing({224: 2.0, 384: 2.0}, {224: 1.0, 384: 1.0}) == 0
    assert math.isnan(tool.crossing({224: 2.0, 384: 1.0}, {224: 1.0, 384: 2.0}))
    assert math.isnan(tool.crossing({}, {224: 1.0}))
    # Ahead, behind and ahead again: from where it stays ahead.
    ours, theirs = {224: 2.0, 384: 1.0, 512: 4.0}, {224: 1.0, 384: 2.0, 512: 2.0}
    assert tool.crossing(ours, theirs) == pytest.approx((384 * 512) ** 0.5)
