"""Restoration: PSNR and SSIM, tiles, poses."""

import math

import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.mm.restoration import metrics, tiles


def image(height=20, width=24, channels=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=rng).double()


def doubled(x):
    return F.interpolate(x, scale_factor=2, mode='nearest')


# --- metrics --------------------------------------------------------------------------------------

def test_psnr_by_hand():
    x = torch.zeros(1, 4, 4)
    assert metrics.psnr(x, x) == math.inf
    assert metrics.psnr(x + 5, x) == pytest.approx(10 * math.log10(255 ** 2 / 25))


def test_ssim_by_hand():
    """On images of the window's size it is one formula, of weighted means."""
    x, y = image(11, 11, 1), image(11, 11, 1, seed=1)
    line = torch.exp(-(torch.arange(11.0).double() - 5) ** 2 / (2 * 1.5 ** 2))
    weights = line[:, None] * line
    weights /= weights.sum()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    cov = (weights * (x - mx) * (y - my)).sum()
    c1, c2 = 2.55 ** 2, 7.65 ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    assert metrics.ssim(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.ssim(x, x) == pytest.approx(1)


def test_luma_of_the_studio_range():
    ends = torch.tensor([0.0, 255.0]).view(1, 1, 2).expand(3, 1, 2)
    torch.testing.assert_close(metrics.luma(ends), torch.tensor([[[16.0, 235.0]]]).double())
    green = torch.zeros(3, 1, 1)
    green[1] = 255
    assert metrics.luma(green).item() == pytest.approx(16 + 128.553)


def test_what_counts():
    x = image()
    y = x.clone()
    y[:, :2] = 0  # a border
    y[0, 8, 8] = 255 - y[0, 8, 8]
    assert metrics.compare(x, y)[0] < metrics.compare(x, y, crop_border=2)[0] < math.inf
    expected = metrics.psnr(metrics.luma(x[:, 2:-2, 2:-2]), metrics.luma(y[:, 2:-2, 2:-2]))
    assert metrics.compare(x, y, 2, on_luma=True)[0] == expected
    assert metrics.compare(x[:1], y[:1], 2, on_luma=True) == metrics.compare(x[:1], y[:1], 2)
    assert metrics.to_8_bit(torch.tensor([-0.1, 0.5, 1.2, 0.499])).tolist() == [0, 128, 255, 127]


@pytest.mark.parametrize('change, message', [
    (dict(target=image(20, 23)), r'\(3, 20, 24\) and \(3, 20, 23\) cannot be compared'),
    (dict(crop_border=10), '20x24 has nothing left without 10 pixels'),
    (dict(crop_border=5), r'at least 11x11 pixels, got \(10, 14\)')])
def test_images_that_cannot_be_compared(change, message):
    with pytest.raises(ValueError, match=message):
        metrics.compare(**{**dict(image=image(), target=image()), **change})


# --- tiles and poses ------------------------------------------------------------------------------

@pytest.mark.parametrize('height, width, tile', [
    (7, 9, 0), (7, 9, 200), (23, 41, 10), (40, 10, 10)])
def test_tiles_join_without_seams(height, width, tile):
    x, calls = torch.rand(2, 3, height, width), []
    y = tiles.restore_in_tiles(doubled, x, 2, tile, lambda *done: calls.append(done))
    assert torch.equal(y, doubled(x))
    count = (height // tile + 1) * (width // tile + 1) if tile else 1
    assert calls == [(i + 1, count) for i in range(count)]


def test_a_tile_sees_its_neighbours():
    """A filter as wide as the overlap finds what it would in the whole image."""
    x = torch.rand(1, 1, 44, 44)

    def blur(x):
        return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), 'reflect'), 5, stride=1)

    torch.testing.assert_close(tiles.restore_in_tiles(blur, x, tile=30), blur(x))
    assert tiles.tile_bounds(44, 2) == [(0, 22, 0, 24), (22, 44, 20, 44)]
    with pytest.raises(ValueError, match='tile must be at least 1'):
        tiles.restore_in_tiles(blur, x, tile=-1)


@pytest.mark.parametrize('size', [(8, 16), (5, 9), (1, 1), (1, 3), (2, 7)])
def test_padding_is_cut_off(size):
    x, given = torch.rand(1, 2, *size), []

    def network(x):
        given.append(tuple(x.shape[2:]))
        return doubled(x)

    assert torch.equal(tiles.restore_padded(network, x, 2, 8), doubled(x))
    assert given == [tuple(-(-side // 8) * 8 for side in size)]


def test_padding_mirrors():
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    seen = []
    tiles.restore_padded(lambda x: seen.append(x) or x, row, 1, 8)
    assert seen[0][0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]


def test_eight_poses_are_turned_back():
    x, seen = torch.rand(1, 1, 3, 5), []

    def network(x):
        seen.append(x)
        return doubled(x)

    torch.testing.assert_close(tiles.restore_in_poses(network, x), doubled(x))
    assert len({tuple(y.flatten().tolist()) for y in seen}) == 8
    assert [y.shape[2:] for y in seen] == [(3, 5)] * 4 + [(5, 3)] * 4
    uneven = tiles.restore_in_poses(lambda x: x * torch.arange(x.shape[-1]), x)
    assert not torch.allclose(uneven, x * torch.arange(5))
