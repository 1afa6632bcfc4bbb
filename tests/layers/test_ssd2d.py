"""SSD2D: the operator m0 of VMamba's public code, position by position, and what it refuses."""

import pytest
import torch
from torch import nn

from vmamba_mm.layers import SS2D, SSD2D, VSSBlock

ACTS = {'silu': lambda u: u / (1 + torch.exp(-u)), 'relu': lambda u: u * (u > 0),
        'gelu': lambda u: u * (1 + torch.erf(u / 2 ** 0.5)) / 2}


def manual_ssd2d(layer, x, act='gelu', gate_act=True, out_norm=None, out_act=False):
    """SSD head by head along each route, loop by loop, in fp64."""
    xz = x @ layer.in_proj.weight.T
    z = None
    if layer.gate:
        xz, z = xz.chunk(2, dim=-1)
    u = ACTS[act](xz if layer.conv2d is None else
                  layer.conv2d[1](xz.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    batch, height, width, inner = u.shape
    _, heads, dim = layer.Ds.shape
    state = (layer.x_proj_weight.shape[1] - heads) // 2
    orders = torch.arange(height * width).view(height, width)
    routes = [orders.flatten(), orders.T.flatten()]
    routes += [r.flip(0) for r in routes]
    total = torch.zeros(batch, height * width, heads, dim, dtype=x.dtype)
    for k, route in enumerate(routes):
        A = -layer.A_logs[k].exp()
        S = torch.zeros(batch, heads, dim, state, dtype=x.dtype)
        for position in route.tolist():
            u_t = u.flatten(1, 2)[:, position]
            dt, b, c = (u_t @ layer.x_proj_weight[k].T).split((heads, state, state), dim=-1)
            dt = torch.log1p(torch.exp(dt + layer.dt_projs_bias[k]))
            x_t = u_t.view(batch, heads, dim)
            S = (torch.exp(dt * A)[..., None, None] * S
                 + torch.einsum('bh,bhp,bn->bhpn', dt, x_t, b))
            total[:, position] += torch.einsum('bhpn,bn->bhp', S, c) + layer.Ds[k] * x_t
    y = total.view(batch, height, width, inner)
    y = layer.out_norm(y) if out_norm is None else out_norm(layer, y)
    if out_act:
        y = ACTS['gelu'](y)
    if z is not None:
        y = y * (ACTS[act](z) if gate_act else z)
    return y @ layer.out_proj.weight.T


def _convolved(conv, y):
    return conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize(('config', 'by_hand'), [
    (dict(), {}), (dict(d_state=3, dt_rank=4, ssm_init='random', gate=True, conv_bias=True), {}),
    (dict(ssm_ratio=2.0, gate=True, act='silu', gate_act=False), dict(act='silu', gate_act=False)),
    (dict(conv_kernel=0, act='relu', out_norm='none', out_act=True),
     dict(act='relu', out_act=True, out_norm=lambda layer, y: y)),
    (dict(conv_kernel=5, out_norm='dwconv', ssm_init='mamba'),
     dict(out_norm=lambda layer, y: _convolved(layer.out_norm[1], y))),
    (dict(out_norm='ln_dwconv'), dict(out_norm=lambda layer, y: _convolved(
        layer.out_norm[2], layer.out_norm[0](y)))),
    (dict(out_norm='softmax'), dict(out_norm=lambda layer, y: y.exp() / y.exp().sum(
        (1, 2), keepdim=True))),
    (dict(out_norm='sigmoid', act='silu', conv_bias=True),
     dict(act='silu', out_norm=lambda layer, y: 1 / (1 + torch.exp(-y))))],
    ids=['m2', 'gate', 'gate-alone', 'no-conv', 'dwconv', 'ln-dwconv', 'softmax', 'sigmoid'])
def test_ssd2d_is_ssd_along_four_routes(config, by_hand):
    torch.manual_seed(0)
    layer = SSD2D(8, **{'d_state': 5, **config}).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), manual_ssd2d(layer, x, **by_hand), rtol=1e-6, atol=1e-8)


def test_maps_of_any_sides():
    torch.manual_seed(0)
    layer = SSD2D(4, d_state=2, gate=True).double()
    for sides in ((1, 1), (1, 7), (5, 1), (9, 8)):
        x = torch.randn(1, *sides, 4, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, manual_ssd2d(layer, x), rtol=1e-6, atol=1e-8)
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_official_names_and_shapes():
    layer = SSD2D(32, d_state=6, ssm_ratio=2.0, gate=True, conv_bias=True, out_norm='ln_dwconv')
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        'in_proj.weight': (128, 32), 'conv2d.1.weight': (64, 1, 3, 3), 'conv2d.1.bias': (64,),
        'x_proj_weight': (4, 2 + 12, 64), 'A_logs': (4, 2), 'dt_projs_bias': (4, 2),
        'Ds': (4, 2, 32), 'out_norm.0.weight': (64,), 'out_norm.0.bias': (64,),
        'out_norm.2.weight': (64, 1, 3, 3), 'out_proj.weight': (32, 64)}


def test_initialisation():
    torch.manual_seed(0)
    zero, random, mamba = (SSD2D(512, dt_rank=256, ssm_init=kind)
                           for kind in ('zero', 'random', 'mamba'))
    assert all((layer.Ds == 1).all() for layer in (zero, random, mamba))
    assert not zero.A_logs.any() and SSD2D(8).A_logs.shape == (4, 1)
    assert 0 <= zero.dt_projs_bias.min() and 0.09 < zero.dt_projs_bias.max() < 0.1
    assert random.A_logs.detach().std() == pytest.approx(1, rel=0.1)
    assert random.dt_projs_bias.detach().std() == pytest.approx(0.1, rel=0.1)
    A, dt = mamba.A_logs.exp(), torch.nn.functional.softplus(mamba.dt_projs_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() < 0.1 * 1.001


@pytest.mark.parametrize(('config', 'message'), [
    (dict(act='tanh'), 'silu.*gelu.*relu'), (dict(conv_kernel=4), '0 .no convolution. or an odd'),
    (dict(ssm_init='ones'), 'mamba.*random.*zero'), (dict(out_norm='bn'), "'ln', 'none', 'dwconv'"),
    (dict(dt_rank=4), 'dt_rank=4 is 4 heads.*divide the 6'), (dict(dt_rank=0), 'dt_rank=0'),
    (dict(ssm_ratio=0.1), 'ssm_ratio must be at least 1/6')], ids=str)
def test_ssd2d_names_the_choices(config, message):
    with pytest.raises(ValueError, match=message):
        SSD2D(6, **config)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_pure_half_and_autocast(dtype):
    torch.manual_seed(0)
    layer = SSD2D(8, d_state=4, gate=True)
    x = torch.randn(2, 5, 4, 8)
    exact = layer(x)
    with torch.autocast('cpu', dtype):
        torch.testing.assert_close(layer(x).float(), exact, rtol=0.02, atol=0.02)
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('name', ['conv2d', 'conv2d.0', 'conv2d.1', 'out_norm', 'in_proj'])
def test_what_stands_in_for_a_submodule_is_called(name):
    """Where the convolution and SiLU are one op, too."""
    layer, x = SSD2D(8, d_state=2, act='silu'), torch.randn(1, 3, 4, 8)
    plain = layer(x)
    handle = layer.get_submodule(name).register_forward_hook(lambda module, args, y: 2 * y)
    assert not torch.allclose(layer(x), plain)
    handle.remove()
    assert torch.equal(layer(x), plain)
    parent, _, child = name.rpartition('.')
    inner = layer.get_submodule(name)
    layer.get_submodule(parent).register_module(child, nn.Sequential(inner, nn.Tanh()))
    assert not torch.allclose(layer(x), plain)


def test_a_block_with_it_runs_step_by_step():
    block = VSSBlock(8, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_type=SSD2D, ssm_cfg={})
    x = torch.randn(1, 3, 4, 8)
    assert isinstance(block.ssm, SSD2D) and not isinstance(block.ssm, SS2D)
    normed = x + block.ssm(block.norm1(x))
    expected = normed + block.mlp(block.norm2(normed))
    torch.testing.assert_close(block(x), expected)
    assert block.why_not_one_op(x) is not None


def test_what_kernels_read_is_aligned(monkeypatch):
    """With columns that fill up, and the same result."""
    import vmamba_mm.layers.ssd2d as module
    torch.manual_seed(0)
    layer, x, seen = SSD2D(24, d_state=8, dt_rank=3), torch.randn(2, 3, 5, 24), []
    plain = layer(x)

    def watched(*inputs, **kwargs):
        seen.append([t for i, t in enumerate(inputs) if i in (0, 3, 4)])
        return ssd(*inputs, **kwargs)

    ssd = module.ssd
    monkeypatch.setattr(module, 'ssd', watched)
    monkeypatch.setattr(module, 'runs_kernels', lambda x: True)
    torch.testing.assert_close(layer(x), plain)
    for maps in seen:
        for t in maps:
            *strides, last = t.stride()
            assert last == 1 and all(stride % 8 == 0 for stride in strides)
            assert t.storage_offset() % 8 == 0
    assert len(seen) == 2
