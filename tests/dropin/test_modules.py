"""What is importable, what is left alone, and what the command runs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmamba_mm.integrations.dropin.modules import MODULES, ROOTS, names_of


@pytest.mark.parametrize('module', MODULES)
def test_every_name_of_every_module(module):
    imported = importlib.import_module(module)
    assert imported.__spec__.origin == 'vmamba_mm.dropin'
    for name in names_of(module):
        assert getattr(imported, name) is not None
        exec(f'from {module} import {name}', {})


def test_packages_give_their_modules_as_attributes():
    import mamba_ssm
    from mamba_ssm.ops import selective_scan_interface
    assert mamba_ssm.ops.selective_scan_interface is selective_scan_interface
    assert mamba_ssm.ops.triton.layer_norm.RMSNorm is not None
    assert not hasattr(mamba_ssm, '__file__') and repr(mamba_ssm).endswith('(vmamba_mm.dropin)>')


@pytest.mark.parametrize('statement, named, covered', [
    ('from mamba_ssm import Mamba3', 'mamba_ssm.Mamba3', 'Mamba'),
    ('from mamba_ssm.modules.mamba3 import Mamba3', 'mamba_ssm.modules.mamba3',
     'mamba_ssm.modules.mamba_simple'),
    ('from mamba_ssm.ops.triton import ssd_chunk_scan', 'mamba_ssm.ops.triton.ssd_chunk_scan',
     'mamba_ssm.ops.triton.layer_norm'),
    ('import causal_conv1d.causal_conv1d_varlen', 'causal_conv1d.causal_conv1d_varlen',
     'causal_conv1d.causal_conv1d_interface'),
    ('from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel', 'mamba_ssm.models',
     'vmamba_mm.models.CausalLM reads the files'),
    ('from mamba_ssm import MambaLMHeadModel', 'mamba_ssm.MambaLMHeadModel',
     'vmamba_mm.models.CausalLM reads the files'),
    ('from selective_scan_cuda import fwd_bwd', 'selective_scan_cuda.fwd_bwd', 'fwd, bwd'),
])
def test_what_is_not_covered_is_named_in_one_line(statement, named, covered):
    with pytest.raises(ImportError) as raised:
        exec(statement, {})
    line = str(raised.value)
    assert line.startswith(f'{named} is not covered by vmamba_mm.dropin, which has ')
    assert covered in line and '\n' not in line


def test_the_page_lists_what_is_covered():
    page = (Path(__file__).parents[2] / 'docs/mamba-ssm.md').read_text()
    table = page.partition('## What is covered')[2].partition('An import of')[0].splitlines()
    for module in MODULES:
        names = {name for name in names_of(module) if not name.startswith('_')}
        row = [line for line in table if f'`{module}`' in line.split('|')[:2][-1]]
        assert not names or names <= set(re.findall('`([^`]+)`', row[0].split('|')[2])), module


def test_the_versions_are_of_mamba_2():
    import causal_conv1d
    import mamba_ssm
    assert mamba_ssm.__version__.startswith('2.2.') and causal_conv1d.__version__ > '1.4'


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A real mamba_ssm on the path, and nothing else."""
    package = tmp_path / 'mamba_ssm'
    package.mkdir()
    (package / '__init__.py').write_text('Mamba = "the real one"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mamba_ssm']:
        del sys.modules[name]


def test_what_is_installed_is_left_alone(installed, dropin):
    assert dropin.install() == tuple(name for name in ROOTS if name != 'mamba_ssm')
    import mamba_ssm
    assert mamba_ssm.Mamba == 'the real one'
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm.ops'"):
        importlib.import_module('mamba_ssm.ops.selective_scan_interface')
    assert importlib.import_module('selective_scan_cuda').fwd is not None


def test_replace_and_back(installed, dropin):
    import mamba_ssm as real
    assert dropin.install(replace=True) == ROOTS
    import mamba_ssm
    assert mamba_ssm is not real and isinstance(mamba_ssm.Mamba, type)
    assert 'mamba_ssm' not in dropin.install()
    assert importlib.import_module('mamba_ssm').Mamba == 'the real one'


def test_uninstall_leaves_nothing(dropin):
    import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    dropin.uninstall()
    assert not [name for name in sys.modules if name.partition('.')[0] in ROOTS]
    for name in ROOTS:
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)


def test_install_loads_no_torch():
    code = ('import sys, vmamba_mm.dropin; vmamba_mm.dropin.install(); '
            'sys.exit("torch" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# --- python -m vmamba_mm.dropin -------------------------------------------------------------------

@pytest.fixture
def command(tmp_path, monkeypatch):
    """``main`` with arguments, in a folder with train.py, which writes what it finds to 'found'."""
    from vmamba_mm.integrations.dropin import main
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub/beside.py').write_text('here = True\n')
    (tmp_path / 'sub/train.py').write_text(
        'import sys, beside\nfrom mamba_ssm import Mamba\n'
        'open("found", "w").write(f"{__name__} {sys.argv} {Mamba}")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [''] + sys.path)
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    yield main
    for name in ('beside', 'sub', 'sub.train'):
        sys.modules.pop(name, None)


def test_a_script_runs_as_python_runs_it(command, tmp_path, capsys):
    command(['sub/train.py', '--lr', '1'])
    assert (tmp_path / 'found').read_text().startswith(
        "__main__ ['sub/train.py', '--lr', '1'] <class 'vmamba_mm.")
    assert capsys.readouterr() == ('', '')


def test_a_module_runs_as_python_runs_it(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / 'sub'))
    command(['-m', 'sub.train', '--lr', '1'])
    assert "train.py', '--lr', '1'] <class" in (tmp_path / 'found').read_text()


def test_the_command_says_what_it_leaves_alone(command, tmp_path, installed, capsys):
    command(['sub/train.py'])
    assert (tmp_path / 'found').read_text().endswith('the real one')
    assert capsys.readouterr().err == (
        'vmamba_mm.dropin: mamba_ssm is installed and used as it is; --replace puts vmamba_mm in '
        'its place\n')
    command(['--replace', 'sub/train.py'])
    assert 'the real one' not in (tmp_path / 'found').read_text()
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('arguments, message', [
    ([], 'usage: python -m vmamba_mm.dropin'),
    (['--gpu'], 'usage: python -m vmamba_mm.dropin'),
    (['-m'], 'usage: python -m vmamba_mm.dropin'),
    (['trian.py'], 'vmamba_mm.dropin: there is no file trian.py')])
def test_wrong_arguments_of_the_command(command, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command(arguments)


def test_help(command, capsys):
    command(['--help'])
    assert capsys.readouterr().out.startswith('usage: python -m vmamba_mm.dropin')
