"""conv_norm_gelu: on a GPU, with the kernel emulated on the CPU, and by PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from test_channels import (
    HALF,
    SINGLE,
    device,
    randn,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_mm.layers.embed import ConvStem
from vmamba_mm.ops import conv_norm_gelu
from vmamba_mm.testing import relative_error

__all__ = ['device']  # a fixture


def make(device, shape=(2, 3, 21, 38), out=48, dtype=SINGLE, parameters=SINGLE):
    """Images, weight, bias, weight and bias of the norm."""
    return [randn(*shape, dtype=dtype, device=device),
            randn(out, shape[1], 3, 3, dtype=parameters, device=device),
            *(randn(out, dtype=parameters, device=device, seed=i) for i in (1, 2, 3))]


def exact(x, weight, bias, *affine):
    """By PyTorch, in the dtype of what it is given."""
    y = F.conv2d(x, weight, bias, 2, 1).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(y, bias.shape, *affine))


class Calls(TorchDispatchMode):
    """How often the op was called."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 'conv_norm_gelu' in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls():
    with Calls() as calls:
        yield calls


def test_nan_stays_in_its_image(kernels):
    x, *parameters = make(kernels)
    with torch.autocast(kernels, HALF), torch.no_grad():
        clean = conv_norm_gelu(x, *parameters)
        x[1, 2, 3, 4] = torch.nan
        found = conv_norm_gelu(x, *parameters)
    assert torch.equal(found[0], clean[0])
    assert found[1, 1:3, 2].isnan().all() and found[1].isnan().sum() == 2 * 48


def test_what_is_left_to_the_others(kernels, calls):
    """Training, fp32, other channels: the same by conv_norm and GELU."""
    leaves = make(kernels)
    with torch.autocast(kernels, HALF):
        for one in leaves:
            one.requires_grad_()
            y = conv_norm_gelu(*leaves)
            y.float().sum().backward()
            assert one.grad is not None and y.dtype == HALF
            one.requires_grad_(False)
    y = conv_norm_gelu(*leaves)
    assert y.dtype == SINGLE
    assert relative_error(y, exact(*(t.double() for t in leaves))) <= 1e-3  # TF32 on a GPU
    for shape, out in (((2, 1, 8, 8), 48), ((2, 3, 8, 8), 40)):
        other = make(kernels, shape, out)
        with torch.autocast(kernels, HALF):
            y = conv_norm_gelu(*other)
        assert relative_error(y, exact(*(t.double() for t in other))) <= 1e-2
    assert not calls.count


@pytest.mark.parametrize('dtype', [HALF, SINGLE], ids=['fp16', 'fp32'])
def test_a_stem(device, dtype):
    """In one op what it is step by step, which a hook brings back."""
    torch.manual_seed(0)
    stem = ConvStem(3, 96).to(device)
    x = randn(2, 3, 30, 44, device=device)
    right = stem.double()(x.double())
    stem.float()
    with torch.no_grad(), torch.autocast(device, HALF, enabled=dtype == HALF):
        found = stem(x)
        for name in ('conv1', 'norm1', 'act'):
            handle = stem.get_submodule(name).register_forward_hook(lambda *args: None)
            step_by_step = stem(x)
            handle.remove()
            assert found.dtype == step_by_step.dtype
            limit = 2 * max(relative_error(step_by_step, right), 1e-3 if dtype == HALF else 1e-6)
            assert relative_error(found, right) <= limit


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(kernels, calls, channels):
    """Refused before a kernel that takes three would read past them."""
    x, *parameters = make(kernels)
    x = x[:, :1].expand(-1, channels, -1, -1)
    with torch.autocast(kernels, HALF), torch.no_grad(), pytest.raises(
            ValueError, match=f'to have 3 channels, but got {channels} channels instead'):
        conv_norm_gelu(x, *parameters)
    assert not calls.count
