"""The scan's attention agrees with the scan, with a loop, and with its derivative."""

import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.ops import selective_scan, ss2d_attention, ss2d_scan
from vmamba_mm.testing import assert_close, ss2d_scan_inputs

# (batch, dim, height, width), pixel
CASES = [((1, 1, 1, 1), (0, 0)), ((2, 3, 1, 9), (0, 4)), ((1, 3, 8, 1), (7, 0)),
         ((2, 4, 5, 7), (0, 0)), ((1, 3, 6, 4), (5, 3)), ((2, 5, 7, 6), (3, 2))]


def route_pixels(height, width, k):
    """The pixels in the order of route k, in loops."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]][k]


@pytest.fixture(params=[1, 2, 16], ids='N{}'.format)
def state(request):
    return request.param


@pytest.fixture(params=CASES, ids=lambda c: 'B{}-D{}-{}x{}-at-{}-{}'.format(*c[0], *c[1]))
def case(request, state):
    shape, pixel = request.param
    return ss2d_scan_inputs(*shape, state=state, rank=2, dtype=torch.float64), pixel


def one_route(inputs, k):
    """The output of route k alone, by the op's sibling on sequences, and its (pixel -> step)."""
    x, x_proj, dt_weight, dt_bias, A, D = inputs.values()
    rank, state, dim = dt_weight.shape[2], A.shape[1], x.shape[1]
    path = route_pixels(*x.shape[2:], k)
    u = torch.stack([x[:, :, i, j] for i, j in path], -1)
    dt, B, C = (x_proj[k] @ u).split((rank, state, state), dim=1)
    channels = slice(k * dim, (k + 1) * dim)
    y = selective_scan(u, dt_weight[k] @ dt, A[channels], B[:, None], C[:, None], D[channels],
                       delta_bias=dt_bias[k], delta_softplus=True, backend='reference')
    return y, path


def test_sums_to_the_output_of_each_route_and_of_the_op(case):
    inputs, (row, column) = case
    found = ss2d_attention(**inputs, pixel=(row, column))
    x, dim = inputs['x'], inputs['x'].shape[1]
    total = 0
    for k in range(4):
        skip = inputs['D'][k * dim:(k + 1) * dim] * x[:, :, row, column]
        y = (found.weights[:, k] * found.values[:, k]).sum((-2, -1)) + skip
        expected, path = one_route(inputs, k)
        assert_close(y, expected[..., path.index((row, column))], 1e-12, f'route {k}')
        total = total + y
    assert_close(total, ss2d_scan(**inputs)[:, :, row, column], 1e-12, 'all routes')


def test_agrees_with_a_loop(case):
    """Every number from the definition, one pixel, channel and state at a time."""
    inputs, pixel = case
    found = ss2d_attention(**inputs, pixel=pixel)
    x, x_proj, dt_weight, dt_bias, A, _ = inputs.values()
    rank, state, dim = dt_weight.shape[2], A.shape[1], x.shape[1]
    weights, values, qk = (torch.zeros_like(t) for t in found[:3])
    seen = torch.zeros_like(found.seen)
    for k in range(4):
        path = route_pixels(*x.shape[2:], k)
        path = path[:path.index(pixel) + 1]
        for b in range(len(x)):
            x_of = {p: x[b, :, p[0], p[1]] for p in path}
            C = x_proj[k, rank + state:] @ x_of[pixel]
            decay = torch.ones(dim, state, dtype=x.dtype)
            for i, j in reversed(path):  # decay holds the steps after (i, j)
                dt, B, _ = (x_proj[k] @ x_of[i, j]).split((rank, state, state))
                delta = F.softplus(dt_weight[k] @ dt + dt_bias[k])
                weights[b, k, :, i, j] = (C * decay * B).sum(1)
                values[b, k, :, i, j] = delta * x_of[i, j]
                qk[b, k, i, j] = C @ B
                seen[k, i, j] = True
                decay = decay * torch.exp(delta[:, None] * A.view(4, dim, state)[k])
    assert_close(found.weights, weights, 1e-12, 'weights')
    assert_close(found.values * found.seen[:, None], values, 1e-12, 'values')
    assert_close(found.qk, qk, 1e-12, 'qk')
    assert torch.equal(found.seen, seen)


def test_is_the_derivative_with_delta_b_and_c_held(case):
    """weights * delta = dy/du, by autograd through the op on sequences; contribution = that * u."""
    inputs, pixel = case
    found = ss2d_attention(**inputs, pixel=pixel)
    x, x_proj, dt_weight, dt_bias, A, _ = inputs.values()
    rank, state, dim = dt_weight.shape[2], A.shape[1], x.shape[1]
    for k in range(4):
        path = route_pixels(*x.shape[2:], k)
        u = torch.stack([x[:, :, i, j] for i, j in path], -1)
        dt, B, C = (x_proj[k] @ u).split((rank, state, state), dim=1)
        u = u.requires_grad_()
        y = selective_scan(u, dt_weight[k] @ dt, A[k * dim:(k + 1) * dim], B[:, None], C[:, None],
                           None, delta_bias=dt_bias[k], delta_softplus=True)
        grad, = torch.autograd.grad(y[..., path.index(pixel)].sum(), u)
        contribution = found.weights[:, k] * found.values[:, k]
        contribution = torch.stack([contribution[:, :, i, j] for i, j in path], -1)
        assert_close(contribution, (grad * u).detach(), 1e-12, f'route {k}')


def test_long_routes_neither_overflow_nor_lose_digits():
    """Where w underflows: 3,600 steps of large delta, in fp32."""
    inputs = ss2d_scan_inputs(1, 2, 60, 60, state=2, dtype=torch.float64)
    inputs['dt_projs_bias'] += 3
    expected = ss2d_attention(**inputs, pixel=(59, 59)).weights
    found = ss2d_attention(**{name: t.float() for name, t in inputs.items()}, pixel=(59, 59))
    assert found.weights.dtype == torch.float32
    assert_close(found.weights, expected, 1e-5)
    assert found.weights[0, 0, :, -1, -1].all() and not found.weights[0, 0, :, 0, 0].any()


@pytest.mark.parametrize('routes', [1, 2])
def test_fewer_routes(routes):
    inputs = ss2d_scan_inputs(2, 3, 4, 6, routes=routes, dtype=torch.float64)
    found = ss2d_attention(**inputs, pixel=(2, 5))
    skip = inputs['D'].view(routes, 3).sum(0) * inputs['x'][:, :, 2, 5]
    y = (found.weights * found.values).sum((1, 3, 4)) + skip
    assert_close(y, ss2d_scan(**inputs)[:, :, 2, 5], 1e-12)


@pytest.mark.parametrize('pixel', [(-1, 0), (0, 5), (4, 0)], ids=str)
def test_pixel_outside(pixel):
    with pytest.raises(ValueError, match='map of 4x5'):
        ss2d_attention(**ss2d_scan_inputs(1, 2, 4, 5), pixel=pixel)


def test_shapes_are_those_of_the_op():
    inputs = ss2d_scan_inputs(1, 2, 4, 5)
    with pytest.raises(ValueError, match='D of shape'):
        ss2d_attention(**dict(inputs, D=inputs['D'][:2]), pixel=(0, 0))
