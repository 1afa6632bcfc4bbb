"""The kernels in kernels/scan1d, against fp64, at more shapes than in test_ops.py.

A device is 'cuda', or 'sm_90', 'sm_80' and 'sm_75': such a GPU emulated on the CPU.
"""

import emulated_cuda
import pytest
import torch

from vmamba_mm.ops import mamba_inner, selective_scan
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.selective_scan import cuda, cuda_scan
from vmamba_mm.ops.selective_scan.cuda_scan import Plan, Sizes, Tile
from vmamba_mm.testing import relative_error

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def divided(monkeypatch):
    """Every sequence is divided into spans."""
    monkeypatch.setattr(cuda_scan, 'max_span', 32)
    launch.forget()
    yield
    launch.forget()


@pytest.fixture
def in_turns(monkeypatch):
    """The warps of a forward take turns in time, wherever they can."""
    monkeypatch.setattr(cuda_scan, 'relay', True)
    launch.forget()
    yield
    launch.forget()


def make(place, batch, groups, dim, length, state, dtype=SINGLE, absent=()):
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(place)

    maps, rows = (batch, groups * dim, length), (batch, groups, state, length)
    inputs = dict(
        u=randn(*maps).to(dtype), delta=randn(*maps).to(dtype) / 2,
        A=-randn(groups * dim, state).abs() - 0.1, B=randn(*rows).to(dtype),
        C=randn(*rows).to(dtype), D=randn(groups * dim), z=randn(*maps).to(dtype),
        delta_bias=randn(groups * dim) - 1, initial_state=randn(batch, groups * dim, state))
    grads = randn(*maps).to(dtype), randn(batch, groups * dim, state)
    return {name: t for name, t in inputs.items() if name not in absent}, grads


def run(inputs, grads, backend, reverse=False, **options):
    """{what: value} for both results and every gradient."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    results = selective_scan(**leaves, delta_softplus=True, reverse=reverse,
                             return_final_state=True, backend=backend, **options)
    given = [g.to(t.dtype) for g, t in zip(grads, results, strict=True)]
    found = torch.autograd.grad(results, list(leaves.values()), given)
    return dict(y=results[0].detach(), final_state=results[1].detach(),
                **dict(zip(leaves, found, strict=True)))


def check(inputs, grads, **options):
    double = {name: t.double() for name, t in inputs.items()}
    expected = run(double, [g.double() for g in grads], 'chunked', **options)
    found = run(inputs, grads, 'cuda', **options)
    for name, value in found.items():
        dtype = inputs[name].dtype if name in inputs else \
            SINGLE if name == 'final_state' else inputs['u'].dtype
        assert value.dtype == dtype
        limit = 2e-5 if dtype == SINGLE else torch.finfo(dtype).eps
        assert relative_error(value, expected[name]) <= limit, name


@pytest.mark.parametrize('device', [
    'sm_90', 'sm_75', pytest.param('cuda', marks=pytest.mark.gpu(nvidia=True))])
@pytest.mark.parametrize('absent', [(), ('z', 'initial_state', 'D', 'delta_bias')],
                         ids=['all', 'bare'])
@pytest.mark.parametrize('shape', [(2, 1, 70, 37, 16), (1, 2, 9, 36, 5), (1, 1, 300, 17, 1)],
                         ids=str)
def test_shapes(place, shape, absent):
    check(*make(place, *shape, absent=absent), reverse=bool(absent))


@pytest.mark.parametrize('state', [2, 3, 8, 24, 60, 100])
def test_states(place, state):
    check(*make(place, 1, 1, 6, 21, state), reverse=True)


@pytest.mark.parametrize('length', [64, 61])
@pytest.mark.parametrize('dtype', [HALF, BRAIN], ids=['fp16', 'bf16'])
def test_halves(place, dtype, length):
    check(*make(place, 2, 2, 40, length, 16, dtype))


@pytest.mark.usefixtures('divided')
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('shape', [(2, 1, 40, 101, 16), (1, 1, 7, 100, 4)], ids=str)
def test_spans(place, shape, reverse):
    check(*make(place, *shape), reverse=reverse)
    check(*make(place, *shape, absent=('z', 'initial_state')), reverse=reverse)


@pytest.mark.parametrize('dtype', [SINGLE, HALF, BRAIN], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('shape', [(2, 1, 40, 100, 16), (1, 2, 7, 37, 9), (1, 1, 16, 64, 16),
                                   (2, 1, 3, 5, 12)], ids=str)
def test_relay(place, shape, reverse, dtype, in_turns):
    """Warps that take turns in time; lengths with and without a tail, in vectors and not."""
    def scan(inputs, backend, **options):
        return selective_scan(**inputs, delta_softplus=True, reverse=reverse,
                              return_final_state=True, backend=backend, **options)

    for absent in ((), ('z', 'initial_state', 'D', 'delta_bias')):
        inputs, _ = make(place, *shape, dtype, absent=absent)
        expected = scan({name: t.double() for name, t in inputs.items()}, 'chunked')
        found, single = scan(inputs, 'cuda'), scan(inputs, 'cuda', out_dtype=SINGLE)
        for one, right in zip((*found, single[0]), (*expected, expected[0]), strict=True):
            limit = 2e-5 if one.dtype == SINGLE else torch.finfo(dtype).eps
            assert relative_error(one, right) <= limit
        assert torch.equal(found[0], single[0].to(dtype))
        assert torch.equal(found[1], single[1])


@pytest.mark.parametrize('more', [2, 4])
def test_more_lanes(place, more, monkeypatch):
    """The states of a channel among more lanes than usual."""
    monkeypatch.setattr(cuda_scan, 'forward_plan', lambda index, sizes, most: Plan.of(
        Tile.of(sizes.state, more), sizes.length, 1))
    launch.forget()
    check(*make(place, 2, 1, 40, 36, 16))
    launch.forget()


def test_dtypes_in_any_mixture(place):
    inputs, grads = make(place, 1, 1, 20, 40, 16, HALF)
    inputs['delta'] = inputs['delta'].float()
    inputs['A'], inputs['D'] = inputs['A'].to(BRAIN).float(), inputs['D'].half()
    check(inputs, grads)
    single = run(inputs, grads, 'cuda', out_dtype=SINGLE)['y']
    assert single.dtype == SINGLE
    assert torch.equal(run(inputs, grads, 'cuda')['y'], single.half())


@pytest.mark.parametrize('device', ['sm_90'])
def test_bit_equal_whichever_thread_is_first(place, monkeypatch):
    inputs, grads = make(place, 2, 1, 70, 37, 16, HALF)
    first = run(inputs, grads, 'cuda')
    for seed in (1, 2):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again = run(inputs, grads, 'cuda')
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_nan_stays_in_its_sample(place):
    inputs, grads = make(place, 3, 1, 20, 37, 16)
    clean = run(inputs, grads, 'cuda')
    inputs['u'][1, 0, 7] = torch.nan
    found = run(inputs, grads, 'cuda')
    for name in ('y', 'final_state', 'delta', 'B'):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])
        assert found[name][1].isnan().any()


@pytest.mark.parametrize('value', [-1e4, -30., 20., 1e3])
def test_extreme_delta(place, value):
    inputs, grads = make(place, 1, 1, 5, 40, 4)
    inputs['delta'].fill_(value)
    double = {name: t.double() for name, t in inputs.items()}
    expected = run(double, [g.double() for g in grads], 'chunked')
    for name, found in run(inputs, grads, 'cuda').items():
        assert found.isfinite().all(), name
        if value < 1e3 or name in ('y', 'u'):  # by A mere rounding is left
            assert relative_error(found, expected[name]) <= 2e-5, name


@pytest.mark.parametrize('routes, dtype, dim', [(1, HALF, 64), (2, HALF, 64), (2, SINGLE, 6)],
                         ids=str)
def test_mixer_with_vectors(place, routes, dtype, dim):
    """At widths where maps are read in vectors of channels."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(place)

    rank, state = 3, 16
    inputs = [randn(2, 37, 2 * dim).to(dtype), randn(routes, dim, 4) / 2, randn(routes, dim),
              randn(routes, rank + 2 * state, dim) / dim ** 0.5, randn(routes, dim, rank) / 2,
              randn(routes, dim) - 1, -randn(routes, dim, state).exp(), randn(routes, dim)]
    grad = randn(2, 37, dim)

    def run(inputs, backend):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = mamba_inner(*leaves, scale=0.5, backend=backend)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    expected = run([t.double() for t in inputs], 'chunked')
    limit = 1e-5 if dtype == SINGLE else 3e-3  # maps between the steps are rounded
    for found, right in zip(run(inputs, 'cuda'), expected, strict=True):
        assert relative_error(found, right) <= limit


def test_plans(monkeypatch):
    """Few sequences are divided, or a channel's states among more lanes; many are not."""
    monkeypatch.setattr(cuda_scan, 'device_limits', lambda index: (132, 228 << 10, 227 << 10))
    many, few, short = (cuda_scan.forward_plan(0, Sizes(*sizes)) for sizes in (
        (64, 1, 768, 197, 16), (1, 1, 384, 65536, 16), (1, 1, 384, 197, 16)))
    assert many.spans == short.spans == 1 and few.spans > 50
    assert many.tile.lanes == few.tile.lanes == 4 < short.tile.lanes
    assert few.span * few.spans >= 65536 and few.span % (few.parts * few.tile.steps) == 0
    assert cuda_scan.backward_plan(0, Sizes(64, 1, 768, 197, 16)).spans == 1


def test_relay_is_chosen(monkeypatch):
    """On an H200, where neither whole sequences nor spans fill the GPU as well, and only there."""
    monkeypatch.setattr(cuda_scan, 'device_limits', lambda index: (132, 228 << 10, 227 << 10))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: (9, 0))

    def is_relayed(batch, dim, length):
        sizes = Sizes(batch, 1, dim, length, 16)
        most = cuda_scan._forward_blocks(0, HALF, sizes, False)
        plan = cuda_scan.forward_plan(0, sizes, most)
        return cuda_scan._is_relayed(0, HALF, sizes, most, plan)

    assert is_relayed(8, 768, 4096)
    for others in ((64, 384, 197), (64, 768, 197), (128, 384, 197), (1, 384, 65536),
                   (8, 5120, 2048), (64, 384, 1568)):
        assert not is_relayed(*others), others


def test_reasons_against():
    inputs, _ = make('cpu', 1, 1, 2, 3, 1)
    order = 'u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias', 'z', 'initial_state'
    reason = cuda.why_not(*map(inputs.get, order), True, False, False, SINGLE)
    assert 'not on an NVIDIA GPU' in reason
