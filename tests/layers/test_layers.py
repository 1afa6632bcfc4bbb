import pytest
import torch

from vmamba_mm.layers import (
    SS2D,
    ConvDownsample,
    ConvStem,
    DropPath,
    MergeDownsample,
    PatchStem,
    VSSBlock,
)
from vmamba_mm.layers.ssm_init import (
    init_A_logs,
    init_dt_bias,
    init_dt_proj,
    init_ssm,
    init_x_proj,
)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    y = layer(torch.ones(4000, 2, 3))
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert (y == y[:, :1, :1]).all()
    assert abs(y.mean() - 1) < 0.05
    one, other = layer.factors(torch.ones(4000, 2), 2)
    assert one.shape == (4000,) and one.dtype == torch.float32
    both = ((one > 0) & (other > 0)).float().mean()
    assert abs(both - 0.75**2) < 0.03  # they are independent
    x = torch.randn(2, 3)
    assert layer.eval()(x) is x and layer.factors(x, 2) == (None, None)
    with pytest.raises(ValueError, match='drop_prob'):
        DropPath(1.0)


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (7, 8), (32, 33)], ids=str)
@pytest.mark.parametrize('stem', [PatchStem, ConvStem])
def test_stems_take_any_size(stem, size):
    out = stem(3, 8)(torch.randn(2, 3, *size))
    if stem is ConvStem:
        expected = [-(-s // 4) for s in size]
    else:
        expected = [max(1, s // 4) for s in size]
    assert list(out.shape) == [2, *expected, 8] and out.isfinite().all()


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (5, 4)], ids=str)
@pytest.mark.parametrize('downsample', [MergeDownsample, ConvDownsample])
def test_downsamplings_round_up(downsample, size):
    out = downsample(8)(torch.randn(2, *size, 8))
    assert list(out.shape) == [2, *(-(-s // 2) for s in size), 16]


def test_merge_takes_the_corners_in_swins_order():
    """x00, x10, x01, x11: the order in which the published reduction weights are stored."""
    layer = MergeDownsample(1)
    layer.norm = torch.nn.Identity()
    layer.reduction = torch.nn.Identity()
    x = torch.tensor([[0., 1.], [2., 3.]]).view(1, 2, 2, 1)
    assert layer(x).flatten().tolist() == [0, 2, 1, 3]


def test_ssm_initialisation_is_the_published_one():
    torch.manual_seed(0)
    dt = torch.nn.functional.softplus(init_dt_bias(4, 5000))
    assert dt.shape == (4, 5000) and dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
    log_dt = dt.log()  # uniform: quantiles on a line
    middle = (torch.log(torch.tensor(1e-3)) + torch.log(torch.tensor(0.1))) / 2
    assert abs(log_dt.median() - middle) < 0.05
    assert torch.equal(init_A_logs(4, 3, 1), torch.zeros(12, 1))
    torch.testing.assert_close(init_A_logs(2, 1, 3).exp(), torch.tensor([[1., 2, 3], [1, 2, 3]]))
    assert 0.2 < init_dt_proj(4, 100, 16).abs().max() <= 0.25
    assert 0.09 < init_x_proj(4, 8, 100).abs().max() <= 0.1


def test_other_ssm_initialisations():
    torch.manual_seed(0)
    for kind in ('mamba', 'random', 'zero'):
        weight, bias, A_logs = init_ssm(kind, 4, 500, 2, 6)
        assert (weight.shape, bias.shape, A_logs.shape) == ((4, 500, 6), (4, 500), (2000, 2))
        if kind == 'mamba':
            assert torch.equal(A_logs, init_A_logs(4, 500, 2))
        elif kind == 'random':
            for values, std in ((weight, 0.1), (bias, 0.1), (A_logs, 1.0)):
                assert values.std() == pytest.approx(std, rel=0.05)
                assert abs(values.mean()) < 0.1 * std
        else:
            assert not A_logs.any()
            for values in (weight, bias):
                assert values.min() >= 0 and values.max() < 0.1
                assert values.mean() == pytest.approx(0.05, rel=0.05)
        assert (SS2D(6, ssm_init=kind).Ds == 1).all()


@pytest.mark.parametrize(('config', 'message'), [
    (dict(act='tanh'), 'silu.*gelu.*relu'), (dict(conv_kernel=4), '0 .no convolution. or an odd'),
    (dict(conv_kernel=1), 'at least 3'), (dict(ssm_init='ones'), 'mamba.*random.*zero'),
    (dict(scan='zigzag'), 'cross.*unidirectional.*bidirectional.*cascade'),
    (dict(ssm_ratio=0.1), 'ssm_ratio must be at least 1/6')],
    ids=str)
def test_ss2d_names_the_choices(config, message):
    with pytest.raises(ValueError, match=message):
        SS2D(6, **config)


def test_mlp_of_no_width():
    with pytest.raises(ValueError, match='mlp_ratio must be 0 .no MLP. or at least 1/6'):
        VSSBlock(6, mlp_ratio=0.1, drop_path=0.0, with_cp=False, ssm_cfg={})


ACTS = {'silu': lambda u: u / (1 + torch.exp(-u)), 'relu': lambda u: u * (u > 0),
        'gelu': lambda u: u * (1 + torch.erf(u / 2 ** 0.5)) / 2}


def manual_ss2d(layer: SS2D, x, act='silu'):
    """The paper's figure 3, step by step and loop by loop, in fp64."""
    xz = x @ layer.in_proj.weight.T
    z = None
    if layer.gate:
        xz, z = xz.chunk(2, dim=-1)
    u = xz.permute(0, 3, 1, 2)
    u = ACTS[act](u if layer.conv2d is None else layer.conv2d(u))
    batch, dim, height, width = u.shape
    rank, state = layer.dt_projs_weight.shape[2], layer.A_logs.shape[1]
    orders = torch.arange(height * width).view(height, width)
    routes = [orders.flatten(), orders.T.flatten()]
    routes += [r.flip(0) for r in routes]
    total = torch.zeros(batch, dim, height * width, dtype=x.dtype)
    for k, route in enumerate(routes):
        A = -layer.A_logs[k * dim:(k + 1) * dim].exp()
        skip = layer.Ds[k * dim:(k + 1) * dim]
        h = torch.zeros(batch, dim, state, dtype=x.dtype)
        for position in route.tolist():
            u_t = u.flatten(2)[:, :, position]
            dt, b, c = (u_t @ layer.x_proj_weight[k].T).split((rank, state, state), dim=-1)
            delta = torch.log1p(torch.exp(dt @ layer.dt_projs_weight[k].T
                                          + layer.dt_projs_bias[k]))
            h = torch.exp(delta[..., None] * A) * h + (delta * u_t)[..., None] * b[:, None]
            total[:, :, position] += (h * c[:, None]).sum(-1) + skip * u_t
    y = layer.out_norm(total.view(batch, dim, height, width).permute(0, 2, 3, 1))
    if z is not None:
        y = y * ACTS[act](z)
    return y @ layer.out_proj.weight.T


@pytest.mark.parametrize('config', [
    dict(), dict(d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True), dict(dt_rank=3),
    dict(act='gelu'), dict(act='relu', gate=True), dict(conv_kernel=5, conv_bias=True),
    dict(conv_kernel=0),
    dict(conv_kernel=0, act='gelu', gate=True, d_state=2, ssm_init='random')],
    ids=['s1', 'vanilla', 'dt-rank', 'gelu', 'relu-gate', '5x5', 'no-conv', 'no-conv-gelu'])
def test_ss2d_is_the_papers_figure(config):
    torch.manual_seed(0)
    layer = SS2D(6, **config).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    expected = manual_ss2d(layer, x, config.get('act', 'silu'))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-8)


def test_with_cp_gives_the_same_result_and_gradients():
    torch.manual_seed(0)
    config = dict(mlp_ratio=4.0, drop_path=0.5, ssm_cfg={})
    block, checkpointed = (VSSBlock(4, with_cp=cp, **config).train() for cp in (False, True))
    checkpointed.load_state_dict(block.state_dict())
    x = torch.randn(4, 3, 3, 4)
    results = []
    for b in (block, checkpointed):
        torch.manual_seed(1)
        y = b(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in b.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_pure_half_and_autocast(dtype):
    torch.manual_seed(0)
    block = VSSBlock(8, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg={})
    x = torch.randn(2, 5, 4, 8)
    exact = block(x)
    with torch.autocast('cpu', dtype):
        torch.testing.assert_close(block(x).float(), exact, rtol=0.02, atol=0.02)
    half = block.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('name', ['ssm.conv2d', 'mlp.fc1', 'mlp.fc2', 'ssm.in_proj'])
def test_what_stands_in_for_a_submodule_is_called(name):
    """Adapters replace submodules or hook to them; the ops that take their parameters know."""
    block = VSSBlock(8, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg={})
    x = torch.randn(1, 3, 4, 8)
    plain = block(x)
    parent, _, child = name.rpartition('.')
    inner = block.get_submodule(name)

    class Adapter(type(inner)):
        def forward(self, x):
            return 2 * super().forward(x)

    handle = inner.register_forward_hook(lambda module, args, y: 2 * y)
    hooked = block(x)
    handle.remove()
    assert torch.equal(block(x), plain)
    inner.__class__ = Adapter
    assert torch.equal(block(x), hooked) and not torch.allclose(hooked, plain)
