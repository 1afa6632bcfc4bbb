"""tools/bench/readme_table.py, from rows that are made up."""

import sys
from pathlib import Path

import pytest

from vmamba_mm.errors import UserError

SETTING = dict(device='a GPU', torch='2.9', timm='1.0', dtype='float16', shrink='1', problem='')


@pytest.fixture
def tool(load_tool):
    pytest.importorskip('timm')
    return load_tool('bench/readme_table.py')


@pytest.fixture
def files(tool, tmp_path):
    """CSV files of both benches, a page for all tables, and a README for the first."""
    report, steps = tool.report, tool.steps
    nothing = dict.fromkeys(report.NUMBERS, report.NAN)
    rows = {
        report.Case('tiny_s1l8'): dict(images_per_s=11731.4, ms=10.9, peak_gib=1.28),
        report.Case('tiny_s1l8', 'forward+backward'): dict(images_per_s=3237.0, peak_gib=6.427),
        report.Case('convnext_b'): dict(images_per_s=2000.0)}
    report.SHEET.write(tmp_path / 'a.csv', {
        case: {**nothing, **row, **SETTING} for case, row in rows.items()})
    row = {**dict.fromkeys(steps.NUMBERS, report.NAN), 'ms': 111.4, 'peak_gib': 5.07,
           'device': 'a GPU', 'torch': '2.9', 'mm': 'mmdet 3', 'shrink': '1', 'problem': ''}
    steps.SHEET.write(tmp_path / 'b.csv', {steps.Case('swin_t', 'upernet', 'fp16'): row})
    for name, place in (('page.md', tool.ALL), ('README.md', tool.FIRST)):
        (tmp_path / name).write_text(f'before\n<!-- {place} -->\nold\n<!-- /{place} -->\nafter\n')
    return [str(tmp_path / name) for name in ('a.csv', 'b.csv', 'page.md', 'README.md')]


def call(tool, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['readme_table.py', *argv])
    tool.main()


def test_tables(tool, files, monkeypatch):
    models, steps, page, readme = files
    call(tool, monkeypatch, '--models', models, '--steps', steps, '--readme', page, readme)
    text, short = Path(page).read_text(), Path(readme).read_text()
    assert text.startswith('before\n<!-- performance -->\n\na GPU, torch 2.9, timm 1.0, fp16 ')
    assert text.endswith('\n<!-- /performance -->\nafter\n') and 'old' not in text
    assert '| inference, images/s | 11,731 | - | - |\n' in text
    assert '| `tiny_s1l8` | 11,731 | 3,237 | 6.43 |\n| ConvNeXt-B | 2,000 | - | - |\n' in text
    assert '| UperNet 512x512 b4, fp16 | - | 111 ms, 5.07 GiB | - |\n' in text
    assert 'compiled' not in text and 'Mask R-CNN' not in text  # not measured
    assert short.startswith('before\n<!-- speed -->\n\na GPU, torch 2.9') and 'old' not in short
    assert '| inference, images/s | 11,731 | - | - |\n' in short and 'ConvNeXt-B' not in short


def test_tables_of_vim(tool, monkeypatch, tmp_path):
    report, nothing = tool.report, dict.fromkeys(tool.report.NUMBERS, tool.report.NAN)
    rows = {
        report.Case('vim_small'): dict(images_per_s=6123.4, ms=20.9, peak_gib=1.0),
        report.Case('vim_small', 'forward+backward'): dict(images_per_s=2000.0, peak_gib=5.04),
        report.Case('deit_s', 'forward+backward', precision='pure'): dict(images_per_s=4004.0),
        report.Case('published_vim_s'): dict(images_per_s=2003.0),
        tool.sizes.case_of('vim_small', 'inference', 1248): dict(
            images_per_s=150.0, ms=26.7, peak_gib=0.811)}
    report.SHEET.write(tmp_path / 'a.csv', {
        case: {**nothing, **row, **SETTING} for case, row in rows.items()})
    page = tmp_path / 'page.md'
    page.write_text('<!-- performance -->\nkept\n<!-- /performance -->\n<!-- vim -->\n'
                    '<!-- /vim -->\nafter\n')
    call(tool, monkeypatch, '--models', str(tmp_path / 'a.csv'), '--readme', str(page))
    text = page.read_text()
    assert '<!-- performance -->\nkept\n<!--' in text and text.endswith('<!-- /vim -->\nafter\n')
    assert ('| 224x224, batch 128, images/s | inference, autocast | forward+backward, autocast | '
            'forward+backward, pure | peak') in text
    assert '| Vim-S | 6,123 | 2,000 | - | 5.04 |\n' in text
    assert '| DeiT-S | - | - | 4,004 | - |\n' in text
    assert '| Vim-S, as published, our scan | 2,003 | - | - | - |\n' in text
    assert '| 224x224 | 1248x1248 |\n' in text
    assert '| Vim-S | 6,123, 1 GiB | 150, 0.811 GiB |\n' in text


def test_mistakes(tool, files, monkeypatch):
    models, steps, page, readme = files
    other = Path(steps).read_text().replace('a GPU', 'another')
    Path(steps).write_text(other)
    with pytest.raises(UserError, match='device a GPU and another'):
        call(tool, monkeypatch, '--models', models, '--steps', steps, '--readme', page)
    Path(readme).write_text('nothing')
    with pytest.raises(UserError, match='has no lines <!-- performance -->'):
        call(tool, monkeypatch, '--models', models, '--readme', readme)
