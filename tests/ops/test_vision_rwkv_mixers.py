"""The mixers of Vision-RWKV by their kernels, against fp64, where test_ops.py does not go."""

import pytest
import torch

from vmamba_mm.ops import channel_mixer, spatial_mixer
from vmamba_mm.testing import relative_error

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
LIMITS = {SINGLE: 1e-5, HALF: 1e-2, BRAIN: 6e-2}


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spatial(x, a, b, c, key, value, receptance, output, w, u, **options):
    return spatial_mixer(x, (a, b, c), (key, value, receptance, output), w, u, **options)


def channel(x, a, b, key, value, receptance, **options):
    return channel_mixer(x, (a, b), (key, value, receptance), **options)


def parameters_of(mixer, dim):
    def weight(rows, columns, seed):
        return randn(rows, columns, seed=seed) / columns ** 0.5

    if mixer is spatial:
        return [*(randn(dim, seed=i) for i in range(3)), *(weight(dim, dim, i) for i in range(4)),
                *(randn(dim, seed=i) for i in (7, 8))]
    return [*(randn(dim, seed=i) for i in range(2)), weight(3 * dim, dim, 1),
            weight(dim, 3 * dim, 2), weight(dim, dim, 3)]


def with_gradients(mixer, inputs, grad, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = mixer(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


@pytest.mark.parametrize('mixer, options', [
    (spatial, {}), (spatial, dict(mode='official')), (spatial, dict(pixels=2, share=0.25)),
    (channel, {}), (channel, dict(head_dim=16, pixels=2))],
    ids=['spatial', 'official', 'two pixels', 'channel', 'heads'])
@pytest.mark.parametrize('dtype, weight_dtype', [
    (SINGLE, SINGLE), (HALF, SINGLE), (HALF, HALF), (BRAIN, SINGLE), (SINGLE, HALF)], ids=str)
def test_mixers(place, mixer, options, dtype, weight_dtype):
    """Results and every gradient; the map in one dtype, the parameters in another."""
    shape = 2, 3, 5, 32
    x, grad = (randn(*shape, seed=i).to(place, dtype) for i in (20, 21))
    parameters = [t.to(place, weight_dtype) for t in parameters_of(mixer, shape[3])]
    exact = with_gradients(mixer, [t.double() for t in (x, *parameters)], grad, **options)
    found = with_gradients(mixer, [x, *parameters], grad, **options)
    limit = max(LIMITS[dtype], LIMITS[weight_dtype])
    for i, (actual, right) in enumerate(zip(found, exact, strict=True)):
        assert relative_error(actual, right) <= limit, i


@pytest.mark.parametrize('mixer', [spatial, channel])
def test_maps_as_they_come(place, mixer):
    """A map, a parameter and a gradient with gaps, at addresses that the products do not take."""
    def odd(t):
        return torch.empty((*t.shape[:-1], t.shape[-1] + 1), dtype=t.dtype,
                           device=t.device)[..., 1:].copy_(t)

    x, grad = (randn(1, 4, 3, 16, seed=i).to(place) for i in (1, 2))
    inputs = [x, *(t.to(place) for t in parameters_of(mixer, 16))]
    for actual, right in zip(with_gradients(mixer, [odd(t) for t in inputs], odd(grad)),
                             with_gradients(mixer, inputs, grad), strict=True):
        assert relative_error(actual, right) <= 1e-6
