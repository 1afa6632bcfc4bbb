import subprocess
import sys

import pytest

from vmamba_mm.mm import compat


def test_nothing_is_installed_by_itself(mm, monkeypatch):
    """mmengine.hub would run pip for a package that it does not find."""
    import mmengine.hub
    import mmengine.utils

    def fail(*args, **kwargs):
        pytest.fail('a process was started')

    monkeypatch.setattr(subprocess, 'check_call', fail)
    monkeypatch.setattr(compat, 'installed_version', lambda name: None)
    monkeypatch.setattr(compat.importlib.util, 'find_spec', lambda name: None)
    for package, extra in (('mmdet', 'det'), ('mmseg', 'seg'), ('mmpretrain', 'cls')):
        with pytest.raises(compat.UserError, match=rf"{package}.*vmamba_mm\[{extra}\]"):
            mmengine.hub.get_config(f'{package}::_base_/default_runtime.py')
        with pytest.raises(compat.UserError, match='pip install'):
            mmengine.utils.install_package(package)


@pytest.mark.parametrize('base', [
    'mmpretrain::_base_/default_runtime.py', 'mmdet::_base_/default_runtime.py',
    'mmseg::_base_/default_runtime.py'])
def test_stock_bases_are_found(base, mm, tmp_path):
    pytest.importorskip(base.partition('::')[0])
    from mmengine.config import Config

    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = [{base!r}]\n')
    compat.prepare_mm()  # a second time
    assert 'default_hooks' in Config.fromfile(path) or 'default_scope' in Config.fromfile(path)


def test_advice_fits_the_line(monkeypatch):
    """The extras would install the onedl line over an upstream one."""
    monkeypatch.setattr(compat, 'installed_version',
                        lambda name: '0.10.7' if name == 'mmengine' else None)
    assert 'pip install mmsegmentation==1.2.2' in str(compat.missing_package('mmseg'))
    assert 'vmamba_mm[' not in str(compat.missing_package('mmdet'))


def test_packages_that_do_not_fit(monkeypatch, tmp_path):
    (tmp_path / 'unfit').mkdir()
    (tmp_path / 'unfit' / '__init__.py').write_text("assert False, 'MMCV==9 is incompatible'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(compat.UserError, match='unfit cannot be imported: MMCV==9 is incomp'):
        compat.require_working('unfit')


def test_mmcv_without_operators(monkeypatch, tmp_path):
    """As `make demo` installs it: what needs them says how to get them."""
    (tmp_path / 'detector').mkdir()
    (tmp_path / 'detector' / '__init__.py').write_text('import mmcv._ext')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    with pytest.raises(compat.UserError, match='without its compiled op.*run tools/setup_env.sh'):
        compat.require_working('detector')


@pytest.mark.parametrize('version', ['4.40.0', '5.1.0'])
def test_transformers_5_is_kept_out_of_mmpretrain(version):
    pytest.importorskip('mmpretrain')
    code = f"""
import importlib.metadata as m, sys
real = m.version
m.version = lambda name: {version!r} if name == 'transformers' else real(name)
from vmamba_mm.mm.compat import prepare_mm
prepare_mm()
assert 'mmpretrain' not in sys.modules
dependency = __import__('mmpretrain.utils.dependency', fromlist=['x'])
print('value', dependency.WITH_MULTIMODAL)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'value False' in done.stdout


def test_message_of_a_worker():
    text = ('Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent '
            'call last):\n  File "x.py"\nvmamba_mm.compat.UserError: the image a.png is corrupt\n')
    assert str(compat.UserError(text)) == 'the image a.png is corrupt'


def test_checkpoints_with_code_are_refused(mm, tmp_path):
    """HistoryBuffers are pickled by getattr, which must not open other doors."""
    import torch
    from mmengine.logging import HistoryBuffer

    class Sneaky:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save({'a': HistoryBuffer([1.], [1])}, tmp_path / 'good.pth')
    assert torch.load(tmp_path / 'good.pth', weights_only=True)['a'].mean() == 1
    torch.save(Sneaky(), tmp_path / 'bad.pth')
    with pytest.raises(Exception, match='not safe'):
        torch.load(tmp_path / 'bad.pth', weights_only=True)


def test_importing_mm_is_enough_to_read_every_config():
    """mmseg's own inferencer, in a process without our tools, reads the config first."""
    import subprocess
    import sys
    from pathlib import Path

    pytest.importorskip('mmseg')
    config = Path(__file__).resolve().parents[2] / (
        'configs/vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py')
    code = ('import vmamba_mm.mm\nfrom mmengine.config import Config\n'
            f'Config.fromfile({str(config)!r})')
    subprocess.run([sys.executable, '-c', code], check=True)
