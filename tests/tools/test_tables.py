"""tools/tables.py: what it writes, and that the repository's files are as it writes them."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from vmamba_mm import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools'))
import tables  # noqa: E402


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in place of the repository, with what the tool writes to."""
    readmes = [path.relative_to(tables.ROOT) for path in tables.ROOT.glob('configs/*/README.md')]
    for path in ('README.md', 'model-index.yml', *readmes):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables.ROOT / path, tmp_path / path)
    monkeypatch.setattr(tables, 'ROOT', tmp_path)
    return tmp_path


def test_files_of_the_repository_are_up_to_date(capsys):
    assert tables.main(['--check']) == 0, capsys.readouterr().err


def test_changes_are_found_and_mended(root, capsys):
    readme, index = root / 'configs/vmamba/README.md', root / 'model-index.yml'
    before = readme.read_text(), index.read_text()
    readme.write_text(before[0].replace(' 82.6 ', ' 84.6 '))
    index.unlink()
    assert tables.main(['--check']) == 1
    assert capsys.readouterr().err == (
        'error: configs/vmamba/README.md differs from the metafiles: run make tables\n'
        'error: model-index.yml differs from the metafiles: run make tables\n')
    assert not index.exists()
    assert tables.main([]) == 0
    assert (readme.read_text(), index.read_text()) == before
    assert tables.main(['--check']) == 0


@pytest.mark.parametrize('text, match', [
    ('<!-- table: models -->\n', r'README\.md: a <!-- table: NAME --> has no <!-- end -->'),
    ('<!-- table: vmamba/chess -->\n<!-- end -->\n', "'vmamba/chess', which does not exist; "
     'choose one of models, architectures, licences, .*vmamba/cls, vmamba/det, vmamba/seg'),
])
def test_mistakes_in_a_file(root, capsys, text, match):
    (root / 'README.md').write_text(text)
    assert tables.main([]) == 1
    assert re.search(match, capsys.readouterr().err)


def test_every_family_shows_all_that_it_has(root, capsys):
    readme = root / 'configs/vmamba/README.md'
    readme.write_text(readme.read_text().replace('table: vmamba/seg', 'table: vmamba/det'))
    assert tables.main([]) == 1
    assert 'add the lines <!-- table: vmamba/seg --> and <!-- end -->' in capsys.readouterr().err


def test_tables_say_what_is_published():
    tasks = {(entry.family, entry.task) for entry in zoo.entries()}
    for family, task in tasks:
        models = zoo.entries(family, task=task)
        head, _, *lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in
                           tables.table_of_files(models, tables.ROOT).splitlines()]
        others = ('Config', 'Model', 'Parameters', 'FLOPs', 'Weights')
        assert ('FLOPs' in head) == any(entry.flops for entry in models)
        for cells, entry in zip(lines, models, strict=True):
            assert cells[0] == (f'[{entry.name}]({entry.config})' if entry.config else entry.name)
            numbers = [c for name, c in zip(head, cells, strict=True) if c and name not in others]
            extra = entry.metadata.get('Trained With')
            assert numbers == [f'{value} (with {extra})' if extra else str(value)
                               for value in entry.metrics.values()]
            link = f'[{entry.weights.rpartition("/")[2]}]({entry.weights})' if entry.weights else ''
            assert dict(zip(head, cells, strict=True)).get('Weights', '') == link
    row, = (line for line in tables.table_of_models(tables.ROOT / 'docs').splitlines()
            if line.startswith('| [VMamba]'))
    assert '(../configs/' in row
    best = max(zoo.entries('vmamba', task='det'), key=lambda e: e.metrics['box AP'])
    ap = best.metrics
    assert f'box AP {ap["box AP"]}, mask AP {ap["mask AP"]} (`{best.arch}`)' in row
    row, = (line for line in tables.table_of_models(tables.ROOT).splitlines()
            if line.startswith('| [Mamba]'))
    assert '| none listed; 22 architectures from `mamba-130m` to `rwkv7-2.9b` |' in row
    rows = tables.table_of_licences().splitlines()
    assert len(rows) == 2 + len({entry.family for entry in zoo.entries()})
    row, = (row for row in rows if row.startswith('| [VMamba]'))
    assert '| MIT | [MzeroMiko/VMamba](https://github.com/MzeroMiko/VMamba) |' in row
    rows = tables.table_of_architectures(tables.ROOT).splitlines()
    first = zoo.entries('vmamba', 'tiny_s1l8', 'det')[0].metrics
    line, = (row for row in rows if row.startswith('| `tiny_s1l8` |'))
    assert f'| {first["box AP"]} / {first["mask AP"]} |' in line
