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
    x_BLD = layout.pixels(x)
    assert_close(x_BLD, torch.einsum('bdhw->bhwd', x).flatten(1, 2), 0)
    projected = layout.project(x_BLD, weight)
    assert_close(projected, torch.einsum('bld,pd->blp', x_BLD, weight).flatten(0, 1), 1e-14)
    assert_close(layout.project_weight_grad(projected, x_BLD),
                 torch.einsum('mp,md->pd', projected, x_BLD.flatten(0, 1)), 1e-14)
    y = layout.like(x_BLD.unflatten(1, size).contiguous(), x)
    assert torch.equal(y, x)
    strides = zip(y.shape, y.stride(), torch.empty_like(x).stride(), strict=True)
    assert all(found == expected for n, found, expected in strides if n > 1)


@pytest.mark.parametrize('name', list(LAYOUTS)[:4])
def test_copies_nothing(name):
    x = LAYOUTS[name](torch.randn(3, 6, 5, 4))
    assert layout.pixels(x).data_ptr() == x.data_ptr()
