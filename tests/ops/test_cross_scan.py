import pytest
import torch

from vmamba_mm.ops import cross_merge, cross_scan

SIZES = [(1, 1), (1, 5), (6, 1), (3, 4)]


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_routes_visit_the_map_in_the_documented_order(size):
    height, width = size
    x = torch.arange(height * width).view(1, 1, height, width)
    row, column, row_back, column_back = cross_scan(x)[0, :, 0].tolist()
    assert row == [h * width + w for h in range(height) for w in range(width)]
    assert column == [h * width + w for w in range(width) for h in range(height)]
    assert row_back == row[::-1] and column_back == column[::-1]


@pytest.mark.parametrize('num_routes', [1, 2, 3, 4])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_merge_is_the_transpose_of_scan(size, num_routes):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = torch.randn(2, num_routes, 3, size[0] * size[1], dtype=torch.float64)
    left = (cross_scan(x, num_routes) * y).sum()
    right = (x * cross_merge(y, *size)).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(cross_merge(cross_scan(x, num_routes), *size), num_routes * x)


@pytest.mark.parametrize('num_routes', [1, 2, 3, 4])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_channels_last_is_another_layout(size, num_routes):
    x = torch.randn(2, 3, *size)
    y_BKDL, y_BLKD = cross_scan(x, num_routes), cross_scan(
        x.permute(0, 2, 3, 1), num_routes, channels_last=True)
    assert y_BLKD.is_contiguous() and torch.equal(y_BLKD, y_BKDL.permute(0, 3, 1, 2))
    merged = cross_merge(y_BLKD, *size, channels_last=True)
    assert merged.is_contiguous()
    torch.testing.assert_close(merged, cross_merge(y_BKDL, *size).permute(0, 2, 3, 1))


def test_number_of_routes():
    with pytest.raises(ValueError, match='num_routes must be 1 to 4'):
        cross_scan(torch.zeros(1, 1, 2, 2), 5)
