"""What pip builds holds the configs and the kernels, and a checkout finds them beside it."""

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


def run(code, cwd):
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def build(kind, cwd):
    return cwd / run(f'from setuptools import build_meta\nprint()\n'
                     f'print(build_meta.build_{kind}("."))', cwd)


@pytest.fixture
def checkout(tmp_path):
    """A copy of this one, which has no symbolic links: git does not make them on Windows."""
    tree = tmp_path / 'checkout'
    tree.mkdir()
    for name in FILES:
        shutil.copy(REPO / name, tree)
    for name in FOLDERS:
        shutil.copytree(REPO / name, tree / name, symlinks=True,
                        ignore=shutil.ignore_patterns('__pycache__'))
    assert not [path for path in tree.rglob('*') if path.is_symlink()]
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
    del kernels['vmamba_mm/kernels/resources.json']  # for those who change kernels
    assert 'vmamba_mm/kernels/common/common.cuh' in kernels
    assert found == {**files_of('configs', 'vmamba_mm/.mim/configs'),
                     **kernels,
                     'vmamba_mm/.mim/model-index.yml': (REPO / 'model-index.yml').read_bytes()}


def test_wheel_from_a_checkout(checkout):
    assert_complete(build('wheel', checkout))
    shutil.rmtree(checkout / 'kernels')
    done = subprocess.run([sys.executable, '-c', 'from setuptools import build_meta\n'
                           'build_meta.build_wheel(".")'], cwd=checkout, capture_output=True,
                          text=True)
    assert done.returncode and f'{checkout / "kernels"} is missing' in done.stderr


def test_wheel_from_an_sdist(checkout, tmp_path):
    """And the installed package finds in itself what a checkout has beside it."""
    with tarfile.open(build('sdist', checkout)) as archive:
        archive.extractall(tmp_path / 'sdist', filter='data')
    wheel = build('wheel', next((tmp_path / 'sdist').iterdir()))
    assert_complete(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site')
    assert_usable(tmp_path / 'site', tmp_path / 'site/vmamba_mm/.mim/configs',
                  tmp_path / 'site/vmamba_mm/kernels')


def test_package_where_it_is(checkout):
    """As an editable install has it."""
    assert_usable(checkout, checkout / 'configs', checkout / 'kernels')


def assert_usable(folder, configs, kernels):
    """Configs by the package's name, for mmengine and its hub, and the kernels are there."""
    found = run("""
from mmengine.config import Config
from mmengine.hub import get_config
from vmamba_mm import paths, zoo
from vmamba_mm.mm.compat import prepare_mm
prepare_mm()
prepare_mm()
name = 'vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py'
open('config.py', 'w').write(f"_base_ = 'vmamba_mm::{name}'")
backbone = Config.fromfile('config.py').model.backbone
assert backbone == Config.fromfile(paths.CONFIGS / name).model.backbone
cfg = get_config(f'vmamba_mm::{name}', pretrained=True)
assert cfg.model_path == zoo.entries('vmamba', 'tiny_s1l8', 'cls')[0].weights
assert get_config('mmpretrain::resnet/resnet18_8xb32_in1k.py', pretrained=True).model_path
try:
    get_config('vmamba_mm::vmamba/absent.py')
except FileNotFoundError as err:
    assert 'vmamba_mm has no config vmamba/absent.py' in str(err)
print(paths.CONFIGS, paths.KERNELS)""", folder)
    assert found == f'{configs} {kernels}'


def test_setuptools_knows_the_licence():
    """Releases before 77.0.3 refuse `license = 'Apache-2.0'`."""
    text = (REPO / 'pyproject.toml').read_text()
    asked = re.search(r"requires = \['setuptools>=([\d.]+)'\]", text)
    assert tuple(map(int, asked[1].split('.'))) >= (77, 0, 3)
