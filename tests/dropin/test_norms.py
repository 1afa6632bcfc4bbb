"""mamba_ssm.ops.triton.layer_norm, its other name layernorm, and layernorm_gated."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from s6_by_hand import gradients, on, random, tolerance
from torch import nn

from vmamba_mm.testing import DEVICES, assert_close

MODULES = ['layer_norm', 'layernorm']
DIM = 12


def norm_by_hand(x, weight, bias=None, rms=False, eps=1e-5):
    x = x if rms else x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def inputs():
    """x, residual, weight, bias."""
    return (random(2, 5, DIM), 3 * random(2, 5, DIM, seed=1), random(DIM, seed=2),
            random(DIM, seed=3))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rms', [True, False])
@pytest.mark.parametrize('prenorm', [True, False])
@pytest.mark.parametrize('with_residual', [True, False])
@pytest.mark.parametrize('with_bias', [True, False])
def test_sum_and_norm(with_bias, with_residual, prenorm, rms, device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
    x, residual, weight, bias = inputs()
    tensors = (x, weight, bias if with_bias else None, residual if with_residual else None)
    function = rms_norm_fn if rms else layer_norm_fn

    def both(results):  # of the norm and, with prenorm, of the sum
        return torch.stack(results) if prenorm else results

    def by_hand(x, weight, bias, residual):
        total = x if residual is None else x + residual
        y = norm_by_hand(total, weight, bias, rms)
        return both((y, total)) if prenorm else y

    expected, grads = gradients(by_hand, tensors)
    y, found = gradients(lambda *args: both(function(*args, eps=1e-5, prenorm=prenorm)),
                         on(device, tensors))
    for actual, wanted in zip([y, *found], [expected, *grads], strict=True):
        assert_close(actual.cpu(), wanted, tolerance(device))


def test_is_rms_norm_and_the_default_eps():
    from mamba_ssm.ops.triton.layernorm import layer_norm_fn, rms_norm_fn
    x, residual, weight, _ = inputs()
    y = layer_norm_fn(x, weight, None, residual, is_rms_norm=True)
    assert torch.equal(y, rms_norm_fn(x, weight, None, residual))
    assert_close(y, norm_by_hand(x + residual, weight, rms=True, eps=1e-6), 1e-10)


@pytest.mark.parametrize('residual_dtype, in_fp32, expected', [
    (None, False, torch.bfloat16), (None, True, torch.float32),
    (torch.float32, False, torch.float32), (torch.bfloat16, True, torch.bfloat16)])
def test_dtypes_of_the_results(residual_dtype, in_fp32, expected):
    """The residual keeps its dtype, and the norm is not of the rounded sum."""
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    x, residual, weight, _ = (t.to(torch.bfloat16) for t in inputs())
    residual = None if residual_dtype is None else residual.to(residual_dtype)
    with torch.autocast('cpu', torch.float16):  # which has no effect
        y, total = rms_norm_fn(x, weight.float(), None, residual, prenorm=True,
                               residual_in_fp32=in_fp32)
    assert y.dtype == torch.bfloat16 and total.dtype == expected
    exact = x.double() + (0 if residual is None else residual.double())
    assert_close(total, exact, 1e-2 if expected == torch.bfloat16 else 1e-6)
    assert torch.equal(y, norm_by_hand(exact, weight.double(), rms=True, eps=1e-6
                                       ).float().to(torch.bfloat16))


def test_a_second_branch_and_a_second_norm():
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
    x, residual, weight, bias = inputs()
    x1, weight1, bias1 = random(2, 5, DIM, seed=5), random(DIM, seed=6), random(DIM, seed=7)
    y, y1, total = layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, 1e-5, prenorm=True)
    assert_close(total, x + x1 + residual, 1e-10)
    assert_close(y, norm_by_hand(total, weight, bias), 1e-10)
    assert_close(y1, norm_by_hand(total, weight1, bias1), 1e-10)
    with pytest.raises(ValueError, match='rowscale or x1, not both'):
        layer_norm_fn(x, weight, bias, x1=x1, rowscale=torch.ones(2, 5))


def test_rowscale_and_dropout():
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    x, residual, weight, _ = inputs()
    scale = random(2, 5, seed=8)
    torch.manual_seed(0)
    y, total, mask, none = rms_norm_fn(x, weight, None, residual, dropout_p=0.25, rowscale=scale,
                                       prenorm=True, return_dropout_mask=True)
    assert none is None and mask.dtype == torch.bool and 0.5 < mask.double().mean() < 0.95
    assert_close(total, x * scale[..., None] * mask / 0.75 + residual, 1e-10)
    assert_close(y, norm_by_hand(total, weight, rms=True, eps=1e-6), 1e-10)


@pytest.mark.parametrize('module', MODULES)
def test_the_module(module):
    RMSNorm = importlib.import_module(f'mamba_ssm.ops.triton.{module}').RMSNorm
    norm = RMSNorm(DIM, eps=1e-3, dtype=torch.float64)
    assert [*norm.state_dict()] == ['weight'] and norm.bias is None and norm.eps == 1e-3
    x, residual, _, _ = inputs()
    y, total = norm(x, residual, prenorm=True, residual_in_fp32=True)
    assert_close(y, norm_by_hand(x + residual, norm.weight, rms=True, eps=1e-3).detach(), 1e-10)
    dropping = RMSNorm(DIM, dropout_p=0.5, dtype=torch.float64)
    assert not torch.equal(dropping(x), norm(x)) and torch.equal(dropping.eval()(x), dropping(x))


@pytest.mark.parametrize('rms', [True, False])
def test_norm_and_linear(rms):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn
    x, residual, weight, bias = inputs()
    linear = nn.Linear(DIM, 3, dtype=torch.float64)
    y, total = layer_norm_linear_fn(x, weight, bias, linear.weight, linear.bias, residual, 1e-5,
                                    prenorm=True, is_rms_norm=rms)
    assert_close(total, x + residual, 1e-10)
    assert_close(y, linear(norm_by_hand(total, weight, bias, rms)).detach(), 1e-10)
    with torch.autocast('cpu', torch.bfloat16):
        single = [t.float() for t in (x, weight, bias, linear.weight, linear.bias)]
        y = layer_norm_linear_fn(*single, is_rms_norm=rms)
    assert y.dtype == torch.bfloat16


# --- norms with a gate ----------------------------------------------------------------------------

@pytest.mark.parametrize('rms', [True, False])
@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('group_size', [None, 4])
def test_gated_norms(group_size, before, rms):
    from mamba_ssm.ops.triton.layernorm_gated import LayerNorm, RMSNorm
    x, z, weight, bias = inputs()
    norm = (RMSNorm if rms else LayerNorm)(DIM, group_size=group_size, norm_before_gate=before,
                                           dtype=torch.float64)
    assert (norm.bias is None) == rms
    with torch.no_grad():
        norm.weight.copy_(weight)
        if not rms:
            norm.bias.copy_(bias)

    def by_hand(x, z):
        x = x if before or z is None else x * F.silu(z)
        y = norm_by_hand(x.unflatten(-1, (-1, group_size or DIM)), 1, None, rms).flatten(-2)
        y = y * weight + (0 if rms else bias)
        return y * F.silu(z) if before and z is not None else y

    for gate in (z, None):
        expected, grads = gradients(by_hand, (x, gate))
        y, found = gradients(norm, (x, gate))
        for actual, wanted in zip([y, *found], [expected, *grads], strict=True):
            assert_close(actual, wanted, 1e-10)
    assert norm(x.to(torch.bfloat16), z.to(torch.bfloat16)).dtype == torch.bfloat16


def test_gated_functions():
    from mamba_ssm.ops.triton.layernorm_gated import layernorm_fn, rmsnorm_fn
    x, z, weight, _ = inputs()
    assert torch.equal(layernorm_fn(x, weight, None, z, is_rms_norm=True),
                       rmsnorm_fn(x, weight, None, z))
