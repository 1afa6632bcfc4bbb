"""Manhattan self-attention against its loops, and the rotation against complex numbers."""

import pytest
import torch

from vmamba_mm.ops import masa
from vmamba_mm.ops.masa import decay_masks
from vmamba_mm.ops.masa.reference import masa as by_pixels
from vmamba_mm.ops.rotation import rotate_pairs, rotation_table
from vmamba_mm.testing import DEVICES, assert_close, relative_error, with_grads

FORMS = ('decomposed', 'whole')
SHAPES = [(2, 3, 5, 2, 4, 4), (1, 4, 3, 3, 2, 6), (1, 1, 7, 1, 4, 3), (2, 6, 1, 2, 2, 2),
          (1, 1, 1, 1, 2, 1)]


def make(batch, height, width, heads, dim, value_dim, dtype=torch.float64, device='cpu'):
    rng = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device=device).to(dtype)

    place = batch, height, width, heads
    return dict(q=randn(*place, dim), k=randn(*place, dim), v=randn(*place, value_dim),
                decay=-randn(heads).abs() - 0.1)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_forward_and_gradients(shape, form, device):
    inputs = make(*shape, device=device)
    y, grads = with_grads(masa, inputs, form=form)
    expected, expected_grads = with_grads(by_pixels, inputs, form=form)
    assert_close(y, expected, 1e-12)
    for name, grad in grads.items():
        if expected_grads[name].abs().max() > 1e-12:  # a single pixel has no distances
            assert_close(grad, expected_grads[name], 1e-10, name)
        else:
            assert grad.abs().max() < 1e-12


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision(dtype, form, device):
    """At most twice as far off as the same in plain PyTorch."""
    inputs = make(2, 6, 9, 2, 8, 8, dtype=dtype, device=device)
    exact = by_pixels(*(t.double() for t in inputs.values()), form)
    found = masa(**inputs, form=form)
    assert found.dtype == dtype
    naive = relative_error(by_pixels(*inputs.values(), form), exact)
    assert relative_error(found, exact) <= 2 * naive


@pytest.mark.parametrize('form', FORMS)
def test_any_strides_and_masks_at_hand(form):
    inputs = make(2, 4, 3, 2, 4, 4)
    masks = decay_masks(inputs['decay'], 4, 3, form)
    sizes = [tuple(mask.shape[1:]) for mask in masks]
    assert sizes == ([(3, 3), (4, 4)] if form == 'decomposed' else [(12, 12)])
    turned = {k: t.transpose(1, 3).contiguous().transpose(1, 3) if t.dim() == 5 else t
              for k, t in inputs.items()}
    assert_close(masa(**turned, form=form, masks=masks), masa(**inputs, form=form), 1e-12)


@pytest.mark.parametrize('form', FORMS)
def test_compiled_and_on_meta(form):
    inputs = make(1, 4, 3, 2, 4, 6)
    compiled = torch.compile(masa, fullgraph=True, backend='aot_eager')
    assert_close(compiled(**inputs, form=form), masa(**inputs, form=form), 1e-12)
    on_meta = {k: t.to('meta') for k, t in inputs.items()}
    assert masa(**on_meta, form=form).shape == (1, 4, 3, 2, 6)


@pytest.mark.parametrize('change, message', [
    (dict(form='axial'), r"form='axial' does not exist; choose one of \('decomposed', 'whole'\)"),
    (dict(k=torch.zeros(1, 4, 3, 2, 5)), r'q and k must be \(B, H, W, n, P\).*\(1, 4, 3, 2, 5\)'),
    (dict(v=torch.zeros(1, 3, 4, 2, 4)), r'v \(B, H, W, n, E\), got .*\(1, 3, 4, 2, 4\)'),
    (dict(decay=torch.zeros(3)), r'one number for each of the 2 heads, got shape \(3,\)')])
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        masa(**{**make(1, 4, 3, 2, 4, 4), **change})


# --- the rotation ---------------------------------------------------------------------------------

@pytest.mark.parametrize('dim', [2, 4, 10])
def test_pairs_turn_like_complex_numbers(dim):
    torch.manual_seed(0)
    x = torch.randn(3, 7, dim, dtype=torch.float64)
    rates = torch.tensor([10000 ** (-j / max(dim // 2 - 1, 1)) for j in range(dim // 2)])
    angles = torch.arange(7)[:, None] * rates.double()
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))
                                  * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    found = rotate_pairs(x, rotation_table(torch.arange(7), dim, x.dtype))
    assert_close(found, expected, 1e-6)  # the rates above are in fp32


def test_rotation_of_halves_is_done_in_fp32():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rotation_table(torch.arange(3000, 3005), 4, x.dtype)
    assert table.dtype == torch.float32 and rotate_pairs(x, table).dtype == torch.bfloat16
    exact = rotate_pairs(x.double(), rotation_table(torch.arange(3000, 3005), 4, torch.float64))
    assert relative_error(rotate_pairs(x, table), exact) < 2 ** -8
