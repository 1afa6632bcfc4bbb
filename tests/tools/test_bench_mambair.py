"""The benchmark of MambaIR: what it compares is the same network, and a wrong result is seen."""

import functools

import pytest
import torch

from vmamba_mm.ops import selective_scan


@pytest.fixture
def bench(load_tool):
    load_tool('bench/vm_unet.py')
    return load_tool('bench/mambair.py')


@pytest.mark.parametrize('which', [0, 1])
def test_the_published_form_is_the_same_network(bench, which):
    setting = bench.make_settings(16)[which]._replace(height=9, width=10)
    model = bench.make(setting, 'cpu').double()
    published = bench.PublishedMambaIR(model, functools.partial(selective_scan, backend='chunked'))
    images, _ = bench.make_data(setting, 'cpu', 9, 10)
    torch.testing.assert_close(published(images.double()), model(images.double()))


def test_what_is_wrong_is_seen(bench, monkeypatch, capsys):
    setting = bench.make_settings(16)[0]._replace(height=8, width=8)
    assert bench.is_right(setting, 'cpu')
    forward = bench.MambaIR.forward
    monkeypatch.setattr(bench.MambaIR, 'forward', lambda self, x: 1.5 * forward(self, x))
    assert not bench.is_right(setting, 'cpu')
    assert 'WRONG' in capsys.readouterr().out


def test_wrong_options(bench, monkeypatch):
    monkeypatch.setattr('sys.argv', ['mambair.py', '--shrink', '0'])
    with pytest.raises(SystemExit, match='--shrink must be at least 1'):
        bench.main()
