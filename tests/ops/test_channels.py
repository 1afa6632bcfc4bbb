"""add_norm, layer_norm, dwconv_silu, mlp and vss_block: the CUDA kernels on a GPU and emulated on
the CPU, and what runs elsewhere."""


import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import CUDA, with_kernels

from vmamba_mm.ops import add_norm, dwconv_silu, layer_norm, mlp
from vmamba_mm.ops.fused import channels
from vmamba_mm.testing import relative_error

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Residual, branch, result
TYPES = [(SINGLE, HALF, HALF), (HALF, HALF, HALF), (SINGLE, BRAIN, BRAIN), (SINGLE, SINGLE, SINGLE),
         (HALF, HALF, SINGLE)]
LIMITS = {HALF: 1e-3, BRAIN: 8e-3, SINGLE: 1e-5}  # of a result rounded once, and sums over it


@pytest.fixture(params=['emulated', CUDA, 'sm_75', 'elsewhere'])
def device(request, compiled):
    """The same, and 'cpu' without kernels."""
    if request.param == 'elsewhere':
        yield 'cpu'
    else:
        with with_kernels(request.param, compiled) as device:
            yield device


def randn(*shape, dtype=SINGLE, device='cpu', seed=0):
    rng = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)


def has_kernels(request):
    return 'elsewhere' not in request.node.callspec.id


def skip_types(request, *types):
    if BRAIN in types and 'sm_75' in request.node.callspec.id:
        pytest.skip('bf16 needs sm_80')


def exact_norm(x, branch, scale, weight, bias, eps):
    x, branch, weight, bias = (None if t is None else t.double() for t in (x, branch, weight, bias))
    total = x + branch * (1 if scale is None else scale.double()[:, None, None, None])
    if bias is None:
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


# --- add_norm ---------------------------------------------------------------------------------

@pytest.mark.parametrize('types', TYPES, ids=str)
@pytest.mark.parametrize('shape, scaled', [((3, 5, 7, 96), True), ((2, 3, 1, 768), False)], ids=str)
@pytest.mark.parametrize('rms', [False, True], ids=['layer', 'rms'])
def test_add_norm(request, device, types, shape, scaled, rms):
    skip_types(request, *types)
    dim = shape[-1]
    inputs = [randn(*shape, dtype=types[0], device=device) * 2 + 1,
              randn(*shape, dtype=types[1], device=device, seed=1),
              randn(dim, device=device, seed=2), randn(dim, device=device, seed=3)]
    scale = randn(shape[0], device=device, seed=4) if scaled else None
    grads = [randn(*shape, dtype=types[0], device=device, seed=5),
             randn(*shape, dtype=types[2], device=device, seed=6)]
    if not has_kernels(request):
        inputs[0], inputs[1] = inputs[0].to(types[0]).float(), inputs[1].float()
        grads = [g.float() for g in grads]
    leaves = [t.requires_grad_() for t in (inputs[:3] if rms else inputs)]
    bias = None if rms else inputs[3]
    found = add_norm(*inputs[:3], bias, 1e-3, scale=scale, out_dtype=types[2])
    if has_kernels(request):
        assert [t.dtype for t in found] == [types[0], types[2]]
    found_grads = torch.autograd.grad(found, leaves, [g.to(t.dtype) for g, t in
                                                      zip(grads, found, strict=True)])
    expected = exact_norm(inputs[0], inputs[1], scale, inputs[2], bias, 1e-3)
    expected_grads = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    for one, other in zip((*found, *found_grads), (*expected, *expected_grads), strict=True):
        # The gradient's sum over positions is fp32, of a sum that was rounded for the backward.
        limit = max(LIMITS[one.dtype], LIMITS[types[0]] if one.dim() == 1 else 0)
        assert relative_error(one, other) <= limit


@pytest.mark.parametrize('types', TYPES, ids=str)
def test_layer_norm(request, device, types):
    skip_types(request, *types)
    x = randn(2, 3, 5, 48, dtype=types[0], device=device).requires_grad_()
    weight, bias = (randn(48, device=device, seed=i).to(types[1]).requires_grad_() for i in (1, 2))
    if not has_kernels(request):
        x, weight, bias = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    y = layer_norm(x, weight, bias, out_dtype=types[2])
    grad = randn(*x.shape, device=device, seed=3).to(y.dtype)
    leaves = (x, weight, bias)
    exact = F.layer_norm(x.double(), (48,), weight.double(), bias.double())
    for one, other in zip((y, *torch.autograd.grad(y, leaves, grad)),
                          (exact, *torch.autograd.grad(exact, leaves, grad.double())), strict=True):
        assert relative_error(one, other) <= LIMITS[one.dtype]


def test_sum_without_norm(device):
    x, branch = randn(3, 2, 2, 8, device=device), randn(3, 2, 2, 8, device=device, seed=1)
    scale = torch.tensor([0., 2., 0.5], device=device)
    for factor in (None, scale):
        leaves = [t.clone().requires_grad_() for t in (x, branch)]
        total, normed = add_norm(*leaves, None, None, scale=factor)
        by_hand = 1 if factor is None else factor[:, None, None, None]
        assert normed is None
        torch.testing.assert_close(total, x + branch * by_hand)
        dx, dbranch = torch.autograd.grad(total, leaves, x)
        torch.testing.assert_close(dx, x)
        torch.testing.assert_close(dbranch, x * by_hand)


def test_sum_without_norm_in_another_dtype(kernels):
    x, branch = randn(3, 2, 2, 8, device=kernels), randn(3, 2, 2, 8, device=kernels, dtype=HALF)
    leaves = [t.requires_grad_() for t in (x, branch)]
    total, _ = add_norm(*leaves, None, None, out_dtype=HALF)
    assert total.dtype == HALF
    assert torch.equal(total, (x + branch).half())
    found = torch.autograd.grad(total, leaves, branch.detach())
    assert [t.dtype for t in found] == [SINGLE, HALF]
    assert torch.equal(found[0], branch.float()) and torch.equal(found[1], branch)


@pytest.mark.parametrize('used', [0, 1])
def test_one_of_the_results_is_not_used(device, used):
    leaves = [randn(2, 3, 2, 8, device=device, seed=i).requires_grad_() for i in (0, 1)]
    weight, bias = (randn(8, device=device, seed=i) for i in (2, 3))
    grad = randn(2, 3, 2, 8, device=device, seed=4)
    found = torch.autograd.grad(add_norm(*leaves, weight, bias)[used], leaves, grad)
    expected = torch.autograd.grad(exact_norm(*leaves, None, weight, bias, 1e-5)[used], leaves,
                                   grad.double())
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_norm_of_other_channels_is_pytorchs(kernels):
    x, weight, bias = (randn(*s, device=kernels) for s in ((2, 3, 6), (6,), (6,)))
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (6,), weight, bias))


# --- dwconv_silu ------------------------------------------------------------------------------

def plain_dwconv(x, weight, bias):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3])
    return F.silu(y).permute(0, 2, 3, 1)


def test_dwconv_of_a_slice(kernels):
    """What vanilla VMamba's gate leaves: every other run of channels."""
    whole = randn(2, 5, 6, 32, device=kernels)
    x = whole.chunk(2, dim=3)[0]
    weight = randn(16, 1, 3, 3, device=kernels)
    expected = plain_dwconv(x, weight, None)
    torch.testing.assert_close(dwconv_silu(x, weight), expected)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(dwconv_silu(turned, weight), expected)


# --- mlp --------------------------------------------------------------------------------------

def make_mlp(device, shape=(2, 3, 5, 24), hidden=72, out=20, dtype=SINGLE, weight_dtype=SINGLE):
    sizes = ((hidden, shape[-1]), (hidden,), (out, hidden), (out,))
    parameters = [randn(*size, device=device, dtype=weight_dtype, seed=i) / size[-1] ** 0.5
                  for i, size in enumerate(sizes)]
    return [t.detach().requires_grad_()
            for t in (randn(*shape, device=device, dtype=dtype) * 3, *parameters)]


def test_mlp_keeps_the_input_and_what_gelu_takes(kernels):
    kept = []
    leaves = make_mlp(kernels)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(*leaves)
    maps = [t for t in kept if not any(t is leaf for leaf in leaves[1:])]
    assert sorted(t.numel() for t in maps) == [30 * 24, 30 * 72]




# Parts, rows of a weight, D, and dtypes of weight and bias.
JOBS = [(1, 0, 4, None, SINGLE), (385, 1, 100, HALF, HALF), (31, 9, 36, SINGLE, None),
        (800, 0, 260, None, BRAIN), (33, 2, 32, BRAIN, HALF), (2, 1, 8, SINGLE, SINGLE)]


@pytest.mark.parametrize('jobs', [JOBS, JOBS[::-1], JOBS[1:4], JOBS[2:3]], ids=[6, -6, 3, 1])
def test_jobs_of_sums(kernels, jobs):
    """Writes what it is asked for and nothing beside it."""
    addresses, results = [], []
    partials = [randn(parts, rows + 1, dim, device=kernels) for parts, rows, dim, *_ in jobs]
    for t, (_, rows, _, *dtypes) in zip(partials, jobs, strict=True):
        addresses.append([t.data_ptr()])
        right = t.double().sum(0)
        for exact, dtype in zip((right[:rows].T, right[rows]), dtypes, strict=True):
            size = exact.numel()
            found = torch.full((size + 16,), torch.nan, dtype=dtype or HALF, device=kernels)
            addresses[-1].append(0 if dtype is None else found[8:].data_ptr())
            results.append((found, 8 + size if dtype else 8, exact))
    channels.sum_launch(partials[0].get_device(), *map(channels.SumJob._make, jobs))(*addresses)
    for found, end, exact in results:
        assert found[:8].isnan().all() and found[end:].isnan().all()
        torch.testing.assert_close(found[8:end], exact.reshape(-1)[:end - 8].to(found.dtype))
