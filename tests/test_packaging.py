"""What pip builds holds the configs and the kernels, also where git makes no symbolic links."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FILES = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'CITATION.cff',
         'model-index.yml')
FOLDERS = ('vmamba_mm', 'configs', 'kernels', 'tools')
LINKS = ('vmamba_mm/.mim/configs', 'vmamba_mm/.mim/model-index.yml', 'vmamba_mm/kernels')


def run(code, cwd):
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def build(kind, cwd):
    return cwd / run(f'from setuptools import build_meta\nprint()\n'
                     f'print(build_meta.build_{kind}("."))', cwd)


@pytest.fixture(params=[True, False], ids=['links', 'text files'])
def checkout(request, tmp_path):
    """A copy of this one; without links as git writes it where core.symlinks is false."""
    tree = tmp_path / 'checkout'
    tree.mkdir()
    for name in FILES:
        shutil.copy(REPO / name, tree)
    for name in FOLDERS:
        shutil.copytree(REPO / name, tree / name, symlinks=True,
                        ignore=shutil.ignore_patterns('__pycache__'))
    for name in LINKS:
        link = tree / name
        assert link.is_symlink()
        if not request.param:
            target = link.readlink()
            link.unlink()
            link.write_text(str(target))
    return tree


def files_of(folder, under):
    return {f'{under}/{p.relative_to(REPO / folder).as_posix()}': p.read_bytes()
            for p in (REPO / folder).rglob('*') if p.is_file() and '__pycache__' not in p.parts}


def assert_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()
                 if name.startswith(('vmamba_mm/.mim/', 'vmamba_mm/kernels/'))}
        assert 'vmamba_mm/kernels' not in archive.namelist()
        assert 'vmamba_mm/models/vmamba.py' in archive.namelist()
    kernels = files_of('kernels', 'vmamba_mm/kernels')
    for name in ('loss_curve.png', 'resources.json'):  # for those who change kernels
        del kernels[f'vmamba_mm/kernels/{name}']
    assert 'vmamba_mm/kernels/common/common.cuh' in kernels
    assert found == {**files_of('configs', 'vmamba_mm/.mim/configs'),
                     **kernels,
                     'vmamba_mm/.mim/model-index.yml': (REPO / 'model-index.yml').read_bytes()}


def test_wheel(checkout):
    assert_complete(build('wheel', checkout))


@pytest.mark.parametrize('checkout', [False], indirect=True, ids=['text files'])
def test_without_links(checkout, tmp_path):
    """By way of an sdist; the package where it is, as an editable install has it; half a tree."""
    with tarfile.open(build('sdist', checkout)) as archive:
        archive.extractall(tmp_path / 'sdist', filter='data')
    assert_complete(build('wheel', next((tmp_path / 'sdist').iterdir())))

    found = run('from vmamba_mm.links import KERNELS\nprint(KERNELS)', checkout)
    assert Path(found) == checkout / 'kernels'
    message = run('from vmamba_mm.mm.compat import UserError, get_installed_path\n'
                  'try:\n    get_installed_path("vmamba_mm")\n'
                  'except UserError as err:\n    print(err)', checkout)
    assert 'core.symlinks' in message and 'pip install .' in message

    shutil.rmtree(checkout / 'kernels')
    done = subprocess.run([sys.executable, '-c', 'from setuptools import build_meta\n'
                           'build_meta.build_wheel(".")'], cwd=checkout, capture_output=True,
                          text=True)
    assert done.returncode and f'{checkout / "kernels"} is missing' in done.stderr


def test_setuptools_knows_the_licence():
    """Releases before 77.0.3 refuse `license = 'Apache-2.0'`."""
    text = (REPO / 'pyproject.toml').read_text()
    asked = re.search(r"requires = \['setuptools>=([\d.]+)'\]", text)
    assert tuple(map(int, asked[1].split('.'))) >= (77, 0, 3)
