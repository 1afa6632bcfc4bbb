import functools

import pytest
import torch

from vmamba_mm.layers import ss2d
from vmamba_mm.testing import assert_close


@pytest.fixture
def run(run_tool):
    return functools.partial(run_tool, 'bench/vm_unet.py')


def test_public_chain_is_the_network(load_tool):
    """Logits and every gradient, in fp64, of another size than a square."""
    bench = load_tool('bench/vm_unet.py')
    setting = bench.Setting(dict(base='l2', embed_dims=8, depths=(1, 1), decoder_depths=(1, 2),
                                 d_state=3), 2, 24)
    ours, published = (bench.make(setting, 'cpu', scan).double().eval()
                       for scan in (None, bench.selective_scan))
    images, masks = (t[..., :16].double() for t in bench.make_data(setting, 'cpu', False))
    names = ['logits', *(name for name, _ in ours.named_parameters())]
    for name, found, expected in zip(names, bench.results(published, images, masks),
                                     bench.results(ours, images, masks), strict=True):
        assert_close(found, expected, 1e-7, name)


def test_loss_is_bce_and_dice(load_tool):
    loss = load_tool('bench/vm_unet.py').bce_dice(
        torch.tensor([0.0, 0.0, 0.0, 0.0]).view(2, 1, 1, 2), torch.tensor(
            [1.0, 1.0, 0.0, 0.0]).view(2, 1, 1, 2))
    dice = ((2 * 1 + 1) / (1 + 2 + 1) + 1 / (1 + 1)) / 2
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() + 1 - dice)


def test_both_are_timed(run, capsys):
    run('--device', 'cpu', '--shrink', '8')
    out = capsys.readouterr().out
    assert 'right, the error: logits' in out
    assert out.count(' ms, peak ') == 2 and 'the time of ours times 1.00' in out


def test_a_wrong_result_ends_the_run(run, capsys, monkeypatch):
    right = ss2d.scan_norm
    monkeypatch.setattr(ss2d, 'scan_norm', lambda *args, **kwargs: 1.5 * right(*args, **kwargs))
    with pytest.raises(SystemExit, match='nothing is timed'):
        run('--device', 'cpu', '--shrink', '8')
    out = capsys.readouterr().out
    assert 'WRONG' in out and ' ms' not in out


def test_without_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='finds no GPU'):
        run()
    with pytest.raises(SystemExit, match='at least 1, got 0'):
        run('--shrink', '0')
