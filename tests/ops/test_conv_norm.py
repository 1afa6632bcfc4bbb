"""conv_norm: on a GPU, with the kernels emulated on the CPU, and by PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from test_channels import (
    BRAIN,
    HALF,
    SINGLE,
    device,
    has_kernels,
    randn,
    skip_types,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba_mm.layers import ConvDownsample
from vmamba_mm.ops import conv_norm
from vmamba_mm.testing import relative_error

__all__ = ['device']  # a fixture
NAMES = 'y', 'x', 'weight', 'bias', 'norm weight', 'norm bias'


def make(device, shape=(2, 9, 6, 8), out=36, size=3, dtype=SINGLE, parameters=SINGLE):
    """x, weight, bias, weight and bias of the norm."""
    return [randn(*shape, dtype=dtype, device=device),
            randn(out, shape[3], size, size, dtype=parameters, device=device),
            *(randn(out, dtype=parameters, device=device, seed=i) for i in (1, 2, 3))]


def run(leaves, stride, padding, **kwargs):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = conv_norm(*leaves, stride=stride, padding=padding, **kwargs)
    grad = randn(*y.shape, device=y.device, seed=5).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, grad)


def exact(leaves, stride, padding):
    """The same in fp64, by PyTorch."""
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    x, weight, bias, *affine = leaves
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding)
    y = F.layer_norm(y.permute(0, 2, 3, 1), bias.shape, *affine)
    return y, *torch.autograd.grad(y, leaves, randn(*y.shape, device=y.device, seed=5).to(y))


@pytest.mark.parametrize('feeds', [False, True], ids=['to fp32', 'to half'])
@pytest.mark.parametrize('dtype', [HALF, BRAIN], ids=['fp16', 'bf16'])
def test_autocast(request, device, dtype, feeds):
    """No further from fp64 than twice what autocast's own steps are."""
    skip_types(request, dtype)
    leaves = make(device)
    with torch.autocast(device, dtype):
        found = run(leaves, 2, 1, out_dtype=dtype if feeds else None)
        plain = [t.detach().requires_grad_() for t in leaves]
        y = F.conv2d(plain[0].permute(0, 3, 1, 2), plain[1], plain[2], 2, 1)
        y = F.layer_norm(y.permute(0, 2, 3, 1).float(), (36,), *plain[3:])
        grad = randn(*y.shape, device=device, seed=5)
        plain = y, *torch.autograd.grad(y, plain, grad)
    if has_kernels(request):
        assert found[0].dtype == (dtype if feeds else SINGLE)
    for name, one, other, right in zip(NAMES, found, plain, exact(leaves, 2, 1), strict=True):
        limit = 2 * max(relative_error(other, right), torch.finfo(dtype).eps)
        assert relative_error(one, right) <= limit, name


def test_images_get_no_gradient_and_parameters_alone_do(device):
    x, *parameters = make(device)
    parameters = [p.requires_grad_() for p in parameters]
    y = conv_norm(x, *parameters, stride=2, padding=1)
    found = torch.autograd.grad(y.square().sum(), parameters)
    x.requires_grad_()
    y = conv_norm(x, *parameters, stride=2, padding=1)
    assert all(torch.equal(a, b) for a, b in
               zip(found, torch.autograd.grad(y.square().sum(), parameters), strict=True))


def test_flops_without_a_gradient_by_x(kernels):
    x, *parameters = make(kernels)
    with FlopCounterMode(display=False) as counter:
        y = conv_norm(x, *[p.requires_grad_() for p in parameters], stride=2, padding=1)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 5 * 3 * 36 * 8 * 9)


def test_without_grad_nothing_is_kept(kernels):
    leaves = make(kernels)
    y, mapped, moments = torch.ops.vmamba_mm.conv_norm(*leaves, 2, 1, 1e-5, SINGLE, False)
    assert mapped.numel() == moments.numel() == 0
    assert torch.equal(y, conv_norm(*leaves, stride=2, padding=1))


@pytest.mark.parametrize('changes', [
    {}, dict(dilation=2), dict(groups=2), dict(bias=False), dict(padding_mode='circular'),
    dict(stride=(1, 2)), dict(padding='same', stride=1)], ids=str)
def test_a_convolution_of_another_kind_does_its_own_work(device, changes):
    """A user's own in the place of ours: nothing that the op does not know is left out."""
    down = ConvDownsample(8).to(device)
    options = dict(kernel_size=3, stride=2, padding=1) | changes
    down.conv = nn.Conv2d(8, 16, **options).to(device)
    x = randn(2, 9, 6, 8, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = down.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = F.layer_norm(y, (16,), down.norm.weight, down.norm.bias)
        torch.testing.assert_close(down(x), expected, rtol=1e-4, atol=1e-5)
