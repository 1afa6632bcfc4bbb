"""Maps as matrices: the same products whatever the strides, and no copy where none is needed."""

import pytest
import torch

from vmamba_mm.ops.ss2d_scan import layout
from vmamba_mm.testing import assert_close

LAYOUTS = {
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'channels first': lambda x: x.contiguous(),
    'some channels of a wider map': lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last)[:, 6:],
    'one image for all': lambda x: x[:1].expand(3, -1, -1, -1),
    'rows with gaps': lambda x: torch.cat([x, x], 3).contiguous(
        memory_format=torch.channels_last)[..., 4:],
    'height and width swapped': lambda x: x.transpose(2, 3).contiguous(
        memory_format=torch.channels_last).transpose(2, 3),
}


@pytest.mark.parametrize('make', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('size', [(5, 4), (1, 4), (4, 4), (1, 1)], ids=str)
def test_products_and_strides(make, size):
    height = size[0]
    x = make(torch.randn(3, 6, height, 4, dtype=torch.float64))[..., -size[1]:]
    weight = torch.randn(7, 6, dtype=torch.float64)
    even = layout.pixels(x)
    assert torch.equal(even, x)
    flat = torch.einsum('bdhw->bhwd', x).flatten(0, 2)
    stride_b, stride_pixel, stride_d = layout.strides(even)
    assert torch.equal(flat.view(3, -1, 6), even.as_strided(
        (3, size[0] * size[1], 6), (stride_b, stride_pixel, stride_d)))
    projected = layout.project(even, weight)
    assert_close(projected, flat @ weight.T, 1e-14)
    grad = layout.project_weight_grad(projected, even)
    assert_close(grad, projected.T @ flat, 1e-14)
    assert grad.is_contiguous()
    y = layout.like(x.contiguous(memory_format=torch.channels_last), x)
    assert torch.equal(y, x)
    strides = zip(y.shape, y.stride(), torch.empty_like(x).stride(), strict=True)
    assert all(found == expected for n, found, expected in strides if n > 1)


@pytest.mark.parametrize('name', list(LAYOUTS)[:4])
def test_copies_nothing(name):
    x = LAYOUTS[name](torch.randn(3, 6, 5, 4))
    assert layout.pixels(x).data_ptr() == x.data_ptr()


def test_images_far_apart_are_copied():
    x = torch.empty_strided((2, 4, 3, 5), (2**31, 1, 20, 4), device='meta')
    assert layout.strides(layout.pixels(x)) == (60, 4, 1)
    assert layout.strides(layout.pixels(x[:1])) == (0, 4, 1)
