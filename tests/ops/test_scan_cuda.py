"""The kernels in kernels/scan, for ss2d_scan with any number of states, against fp64."""

import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.ops import selective_scan
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.core.launch import pointer
from vmamba_mm.ops.orders import reference as cross
from vmamba_mm.ops.scan_kernels import cuda as launches
from vmamba_mm.ops.ss2d_scan import chunked, large_state, merge
from vmamba_mm.testing import (
    relative_error,
    ss2d_scan_inputs,
)

needs_gpu = pytest.mark.gpu(nvidia=True)
HALVES = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
# batch, D, H, W, N, K, R
SHAPES = [(1, 32, 1, 1, 1, 4, 2), (3, 20, 1, 40, 4, 4, 1), (1, 33, 37, 1, 16, 2, 3),
          (3, 96, 7, 7, 1, 4, 6), (3, 100, 7, 7, 16, 4, 6), (1, 200, 14, 14, 16, 4, 12),
          (2, 40, 14, 14, 64, 1, 2), (3, 70, 37, 53, 4, 4, 3), (1, 96, 37, 53, 1, 2, 5),
          (3, 96, 56, 56, 16, 4, 6), (1, 40, 200, 336, 16, 4, 2), (1, 64, 200, 336, 1, 4, 2),
          (2, 400, 9, 30, 5, 4, 25), (150, 192, 7, 7, 16, 4, 6)]
NAMES = ('y', 'x', 'x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A', 'D')
# N, K, R, D, parts: one group of states and three
FINISHES = [(1, 4, 2, 20, 300), (5, 2, 3, 33, 1), (40, 1, 1, 12, 9), (16, 4, 0, 7, 20)]
MERGES = [(maps, extra, norm) for maps in (1, 2, 4) for extra in (False, True)
          for norm in (False, True)]


def make(batch, dim, height, width, state, routes, rank, dtype=torch.float32, device='cuda'):
    """Inputs (x in ``dtype``) and the gradient by y."""
    inputs = ss2d_scan_inputs(batch, dim, height, width, state=state, routes=routes, rank=rank,
                              device=device)
    x = inputs['x'] = inputs['x'].to(dtype).contiguous(memory_format=torch.channels_last)
    rng = torch.Generator(device).manual_seed(1)
    return inputs, torch.randn(x.shape, generator=rng, device=device).to(dtype).contiguous(
        memory_format=torch.channels_last)


@pytest.fixture
def divided(monkeypatch):
    """Every scan is divided into spans."""
    monkeypatch.setattr(launches.Scans, 'max_span', 96)
    launch.forget()
    yield
    launch.forget()


def run(inputs, grad_y, logs=False):
    """(y in fp32, six gradients) of the kernels."""
    maps, projected, states = large_state.forward(*inputs.values(), save=True, logs=logs)
    y = maps.sum(0, dtype=torch.float32).permute(0, 3, 1, 2)
    grads = large_state.backward(grad_y, *inputs.values(), projected, states, logs)
    for grad, given in zip(grads, inputs.values(), strict=True):
        assert grad.dtype == given.dtype and grad.shape == given.shape
    assert grads[0].stride() == torch.empty_like(inputs['x']).stride()
    return y, *grads


def exact(inputs, grad_y):
    doubles = [t.double() for t in inputs.values()]
    return (chunked.forward(*doubles, torch.float64),
            *chunked.backward(grad_y.double(), *doubles))


def naive(inputs, grad_y):
    """Plain PyTorch under autocast: projections in half precision, the scan in fp32."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    x, weight, dt_weight, bias, A, D = leaves.values()
    rank, state = dt_weight.shape[2], A.shape[1]
    x_BKDL = cross.scan_forward(x, len(weight))
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, weight.to(x.dtype))
    dt, B, C = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_weight.to(x.dtype))
    y = selective_scan(x_BKDL.flatten(1, 2).float(), delta.flatten(1, 2).float(), A, B.float(),
                       C.float(), D, delta_bias=bias.flatten(), delta_softplus=True,
                       backend='reference')
    y = cross.merge_forward(y.view_as(x_BKDL), *x.shape[2:])
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y.float())


def assert_within(actual, expected, limits, names):
    errors = {name: (relative_error(a, e), limit) for name, a, e, limit
              in zip(names, actual, expected, limits, strict=True)}
    assert all(error <= limit for error, limit in errors.values()), {
        name: f'{error:.1e}, allowed {limit:.1e}' for name, (error, limit) in errors.items()}


def check(inputs, grad_y):
    expected = exact(inputs, grad_y)
    if inputs['x'].dtype == torch.float32:
        limits = [1e-5] * 7
    else:
        eps = torch.finfo(inputs['x'].dtype).eps
        limits = [2 * max(relative_error(n, e), eps / 2)
                  for n, e in zip(naive(inputs, grad_y), expected, strict=True)]
    assert_within(run(inputs, grad_y), expected, limits, NAMES)


@needs_gpu
@pytest.mark.parametrize('shape', SHAPES, ids='{0[0]}x{0[1]}x{0[2]}x{0[3]}-N{0[4]}-K{0[5]}'.format)
def test_shapes(shape):
    check(*make(*shape))


@needs_gpu
@HALVES
@pytest.mark.parametrize('shape', [(1, 32, 1, 1, 4, 4, 2), (3, 100, 7, 7, 16, 4, 6),
                                   (2, 50, 9, 20, 1, 2, 5), (2, 200, 14, 15, 16, 4, 12),
                                   (1, 32, 14, 14, 64, 4, 2)],
                         ids='{0[0]}x{0[1]}x{0[2]}x{0[3]}-N{0[4]}-K{0[5]}'.format)
def test_halves(shape, dtype):
    check(*make(*shape, dtype=dtype))


@needs_gpu
@pytest.mark.parametrize('state', [1, 4, 16])
@pytest.mark.usefixtures('divided')
def test_spans_change_nothing_but_rounding(state):
    check(*make(2, 40, 37, 53, state, 4, 3))


def check_logs(device):
    """A is -exp of what is given, and the gradient is by that."""
    inputs, grad_y = make(2, 20, 5, 7, 5, 4, 3, device=device)
    y, *grads = run(inputs, grad_y)
    logs = (-inputs['A']).log()
    actual = run(dict(inputs, A=logs), grad_y, logs=True)
    grads[4] = grads[4] * inputs['A']
    assert_within(actual, (y, *grads), [1e-5] * 7, NAMES)


@needs_gpu
def test_logs():
    check_logs('cuda')


def check_finish(state, routes, rank, dim, parts, device):
    """Against sums by PyTorch, in dtypes that differ, and with nothing but A."""
    rng = torch.Generator(device).manual_seed(0)
    states, groups = launches.groups_of(state)
    sizes = 1, dim, 1, 1, rank, routes
    sums = torch.randn(parts, routes, groups, states + rank + 2, dim, generator=rng, device=device)
    halves = torch.float16, torch.bfloat16
    shapes = (routes, dim, rank), (routes, dim), (routes * dim, state), (routes * dim,)
    dtypes = (halves[0], torch.float32, torch.float32, halves[1])
    parameters = [torch.randn(shape, generator=rng, device=device).to(dtype)
                  for shape, dtype in zip(shapes, dtypes, strict=True)]
    by_A, by_weight, by_bias, by_D = sums.double().sum(0).split((states, rank, 1, 1), dim=2)
    by_A = by_A.flatten(1, 2)[:, :state].transpose(1, 2).reshape(shapes[2])
    expected = [by_weight.sum(1).transpose(1, 2), by_bias.sum((1, 2)), by_A, by_D[:, 0].flatten()]
    grads = launches.finish(sums, sizes, parameters)
    for grad, other, given in zip(grads, expected, parameters, strict=True):
        assert grad.dtype == given.dtype and grad.shape == given.shape and grad.is_contiguous()
        assert torch.allclose(grad.double(), other, rtol=torch.finfo(grad.dtype).eps, atol=1e-4)
    alone = launches.finish(sums, sizes, (None, None, parameters[2], None), logs=True)
    assert alone[0] is alone[1] is alone[3] is None
    assert torch.allclose(alone[2], -grads[2] * parameters[2].exp(), rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize('case', FINISHES, ids=str)
def test_finish(case):
    check_finish(*case, 'cuda')


def check_merge(count, extra, norm, batch, dim, length, device):
    """fp32 maps added up, in the extra one's place if there is one, and normed."""
    rng = torch.Generator(device).manual_seed(0)
    maps = torch.randn(count, batch, length, dim, generator=rng, device=device)
    weight, bias = (torch.randn(dim, generator=rng, device=device).half() for _ in range(2))
    other = torch.randn(batch, length, dim, generator=rng, device=device) if extra else None
    expected = maps.double().sum(0) + (other.double() if extra else 0)
    normed, moments = torch.empty_like(maps[0]), maps.new_empty(batch, length, 2)
    merged = other if extra else torch.empty_like(normed)
    given = dict(maps=maps, extra=other, merged=merged)
    if norm:
        given.update(normed=normed, weight=weight, bias=bias, moments=moments)
    merge.launch(maps.get_device(), maps.dtype, count, batch, (batch, dim, length), extra,
                 weight.dtype if norm else None)(
        **{name: pointer(t) for name, t in given.items()}, eps=1e-5)
    assert relative_error(merged, expected) < 1e-6
    if not norm:
        return
    assert relative_error(normed, F.layer_norm(expected, (dim,), weight.double(), bias.double())
                          ) < 1e-5
    variance = expected.var(2, correction=0)
    assert relative_error(moments[..., 0], expected.mean(2)) < 1e-4
    assert relative_error(moments[..., 1], (variance + 1e-5).rsqrt()) < 1e-5


@needs_gpu
@pytest.mark.parametrize('case', MERGES, ids=str)
def test_merge_of_fp32(case):
    for sizes in ((3, 100, 63), (1, 4, 1), (2, 1536, 49)):
        check_merge(*case, *sizes, 'cuda')


@needs_gpu
def test_strides():
    inputs, grad_y = make(2, 32, 9, 14, 16, 4, 3)
    expected = run(inputs, grad_y)
    x = inputs['x']
    wide = torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)
    turned = x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    for other in (x.contiguous(), wide[:, 32:], turned):
        for grad in (grad_y, grad_y.contiguous()):
            assert_within(run(dict(inputs, x=other), grad), expected, [1e-5] * 7, NAMES)


@needs_gpu
@pytest.mark.parametrize('bias', [-40., 0., 20., 1e3])
def test_extreme_delta(bias):
    inputs, grad_y = make(2, 32, 9, 14, 16, 4, 2)
    inputs['dt_projs_bias'].fill_(bias)
    if bias == 1e3:  # all that remains of A is rounding
        expected, actual = exact(inputs, grad_y), run(inputs, grad_y)
        assert_within(actual[:2], expected[:2], [1e-5] * 2, NAMES[:2])
        assert all(t.isfinite().all() for t in actual)
    else:
        check(inputs, grad_y)
    inputs['x'].zero_()
    results = run(inputs, grad_y)
    assert not results[0].any() and all(t.isfinite().all() for t in results)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_nan_stays_in_its_sample(dtype):
    inputs, grad_y = make(5, 40, 7, 7, 16, 4, 2, dtype=dtype)
    clean = run(inputs, grad_y)
    inputs['x'][1, 0, 2, 2] = torch.nan
    for before, after in zip(clean[:2], run(inputs, grad_y)[:2], strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[2:], after[2:])
        assert after[1].isnan().any()


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_bit_equal_from_run_to_run(dtype):
    inputs, grad_y = make(2, 200, 40, 30, 16, 4, 6, dtype=dtype)
    first = run(inputs, grad_y)
    for _ in range(3):
        assert all(map(torch.equal, first, run(inputs, grad_y)))


def test_strides_of_what_has_no_gaps():
    x = torch.empty(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert launches.plain_strides((*x.shape, 1, 4), False) == x.stride()
    assert launches.plain_strides((2, 3, 1, 7, 0, 4), True) == torch.empty(2, 12, 1, 7).stride()


def test_reasons_against():
    assert 'not on an NVIDIA GPU' in large_state.why_not(torch.zeros(1, 2, 3, 3), 1, 16)
