"""The benchmark of DiS: the public chain is the same function, and a wrong one is not timed."""

import pytest
import torch

ARCH = dict(embed_dims=8, depth=2, patch_size=2, image_size=6, in_channels=4, num_classes=3,
            d_state=2)


def test_the_public_chain_is_the_model(load_tool):
    bench = load_tool('bench/dis_step.py')
    ours, published = (bench.make(ARCH, 'cpu', scan).double()
                       for scan in (None, bench.selective_scan))
    batch = [v.double() if v.is_floating_point() else v for v in bench.make_batch(ours, 3, 'cpu')]
    assert type(published.mid_block.mixer).__name__ == 'PublishedMixer'
    error, _ = bench.largest_error(ours, published, batch)
    assert error < 1e-6  # the chain takes A in fp32
    with torch.no_grad():
        published.mid_block.mixer.D.add_(0.1)
    assert bench.largest_error(ours, published, batch)[0] > bench.MAX_ERROR


def test_without_a_gpu(run_tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='finds none'):
        run_tool('bench/dis_step.py')
