"""The kernels in kernels/wkv, against fp64, in more cuts than in test_ops.py.

A device is 'cuda', or 'sm_90': such a GPU emulated on the CPU.
"""

import emulated_cuda
import pytest
import torch

from vmamba_mm.ops import bi_wkv, wkv
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.wkv import cuda_launch
from vmamba_mm.ops.wkv.cuda_launch import Plan, Sizes
from vmamba_mm.testing import relative_error

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
LIMITS = {SINGLE: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}


def official(w, u, k, v, *, backend):
    return bi_wkv(w, u, k, v, mode='official', blocks=8, backend=backend)


OPS = [wkv, bi_wkv, official]


@pytest.fixture
def in_sections(monkeypatch):
    """Blocks of two warps, so that sequences are divided."""
    monkeypatch.setattr(cuda_launch, 'max_warps', 2)
    launch.forget()
    yield
    launch.forget()


def make(op, place, batch, length, channels, dtype=SINGLE, states=True, scale=1.0):
    """Inputs of an op, and gradients by its results."""
    rng = torch.Generator().manual_seed(length + channels)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(place)

    inputs = dict(w=randn(channels) / (1 if op is wkv else length), u=randn(channels),
                  k=(scale * randn(batch, length, channels)).to(dtype),
                  v=randn(batch, length, channels).to(dtype))
    grads = [randn(batch, length, channels).to(dtype)]
    if op is wkv and states:
        inputs['state'] = randn(batch, 3, channels)
        inputs['state'][:, 1].exp_()
        grads.append(randn(batch, 3, channels))
    return inputs, grads


def run(op, inputs, grads, backend, **options):
    """{what: value} for the results and every gradient."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    if len(grads) > 1:
        options['return_state'] = True
    results = op(**leaves, **options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    found = torch.autograd.grad(results, [*leaves.values()],
                                [g.to(t.dtype) for g, t in zip(grads, results, strict=True)],
                                materialize_grads=True)
    return dict(zip(('y', 'final_state'), (t.detach() for t in results), strict=False),
                **dict(zip(leaves, found, strict=True)))


def check(op, inputs, grads, limit=None, plain=False, **options):
    """``plain``: twice the error of plain PyTorch in the same dtype will do too."""
    double = {name: t.double() for name, t in inputs.items()}
    expected = run(op, double, [g.double() for g in grads], 'chunked', **options)
    found = run(op, inputs, grads, 'cuda', **options)
    limit = limit or LIMITS[inputs['v'].dtype]
    for name, right in expected.items():
        assert found[name].isfinite().all(), name
        error = error_of(found[name], right)
        if error > limit and plain:
            of_plain = error_of(run(op, inputs, grads, 'reference', **options)[name], right)
            assert error <= 2 * of_plain, (name, error, of_plain)
        else:
            assert error <= limit, (name, error)
    return found


def error_of(found, right):
    """Of gradients that would be 0 but for rounding, it is that of their terms, about 1."""
    return ((found.double() - right).abs().max() / right.abs().max().clamp_min(1.0)).item()


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('dtype', [SINGLE, HALF, BRAIN], ids=str)
@pytest.mark.parametrize('shape', [(2, 37, 40), (1, 196, 5)], ids=str)
def test_one_section(place, op, dtype, shape):
    check(op, *make(op, place, *shape, dtype))


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('length', [1, 2, 8, 9, 57, 225, 256])
def test_lengths(place, op, length):
    check(op, *make(op, place, 1, length, 3))


@pytest.mark.usefixtures('in_sections')
@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('shape, states', [((2, 100, 5), True), ((1, 257, 3), True),
                                           ((1, 29, 33), False), ((1, 1000, 2), False)], ids=str)
def test_sections(place, op, shape, states):
    check(op, *make(op, place, *shape, states=states))


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('sectioned', [False, True])
@pytest.mark.parametrize('strength', [3.0, 40.0, -3.0])
def test_strong_decays_and_bonuses(place, op, sectioned, strength, request):
    """More than a span holds relative to one exponent."""
    if sectioned:
        request.getfixturevalue('in_sections')
    inputs, grads = make(op, place, 2, 61, 5, scale=5.0)
    inputs['w'] += abs(strength) ** 0.5 if op is wkv else strength
    inputs['u'] *= strength
    check(op, inputs, grads, limit=1e-4)  # exponents are up to 200


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('sectioned', [False, True])
@pytest.mark.parametrize('scale, shift', [(100.0, 0.0), (1.0, -3000.0), (1.0, 3000.0)])
def test_keys_of_any_size(place, op, sectioned, scale, shift, request):
    if sectioned:
        request.getfixturevalue('in_sections')
    inputs, grads = make(op, place, 2, 61, 5, states=False)
    # What fp32 holds beside the shift.
    inputs['k'] = (8 * scale * inputs['k']).round() / 8 + shift
    # fp32 holds exponents of 300 to 2e-5, and the gradient by w has them times distances.
    check(op, inputs, grads, limit=1e-3 if shift else 1e-4, plain=True)


@pytest.mark.parametrize('op', OPS)
def test_one_large_key_takes_all(place, op):
    inputs, grads = make(op, place, 1, 50, 2, states=False)
    inputs['k'][:, 20] = 500
    found = check(op, inputs, grads, limit=1e-3)['y'][0, 21:]
    assert relative_error(found, inputs['v'][0, 20].expand_as(found)) <= 1e-5


@pytest.mark.parametrize('mode, eps', [('paper', 0.0), ('official', 1e-6)])
def test_weights_of_a_single_token_have_no_gradient_but_by_eps(place, mode, eps):
    inputs, grads = make(bi_wkv, place, 2, 1, 5)
    found = run(bi_wkv, inputs, grads, 'cuda', mode=mode)
    # eps is beside a weight over the larger of exp(k) and exp(u + k).
    expected = eps * grads[0] * inputs['v'] * (-inputs['u']).clamp_min(0).exp()
    for name, right in (('k', expected), ('u', expected.sum((0, 1))), ('w', inputs['w'] * 0)):
        assert (found[name] - right).abs().max() <= 1e-4 * right.abs().max(), name


def test_no_tokens_before(place):
    """Their state has an exponent of minus infinity."""
    inputs, grads = make(wkv, place, 2, 20, 3)
    inputs['state'] = torch.zeros_like(inputs['state'])
    inputs['state'][:, 2] = -torch.inf
    found = run(wkv, inputs, grads, 'cuda')
    del inputs['state']
    expected = run(wkv, inputs, grads, 'cuda')
    for name, right in expected.items():
        assert torch.equal(found[name], right), name
    assert not found['state'].any()


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('sectioned', [False, True])
def test_nan_stays_in_its_sample_and_channel(place, op, sectioned, request):
    if sectioned:
        request.getfixturevalue('in_sections')
    inputs, grads = make(op, place, 3, 61, 5)
    clean = run(op, inputs, grads, 'cuda')
    inputs['k'][1, 30, 2] = torch.nan
    found = run(op, inputs, grads, 'cuda')
    for name in ('y', 'k', 'v'):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])
        assert torch.equal(found[name][1, :, [0, 1, 3, 4]], clean[name][1, :, [0, 1, 3, 4]])
        assert found[name][1, 40, 2].isnan()


@pytest.mark.usefixtures('in_sections')
@pytest.mark.parametrize('op', OPS)
def test_bit_equal_whichever_thread_is_first(place, op, monkeypatch):
    inputs, grads = make(op, place, 2, 61, 40, HALF)
    first = run(op, inputs, grads, 'cuda')
    for seed in (1, 2, 3):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again = run(op, inputs, grads, 'cuda')
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize('op', OPS)
def test_views_and_parameters_in_half_precision(place, op):
    inputs, grads = make(op, place, 2, 37, 24, BRAIN)
    expected = run(op, inputs, grads, 'cuda')
    both = torch.cat((inputs['k'], inputs['v']), 2)
    moved = inputs | dict(zip('kv', both.chunk(2, 2), strict=True))
    found = run(op, moved, [grads[0].transpose(1, 2).contiguous().transpose(1, 2), *grads[1:]],
                'cuda')
    for name, right in expected.items():
        assert torch.equal(found[name], right), name
    inputs.update(w=inputs['w'].half(), u=inputs['u'].half())
    found = check(op, inputs, grads)
    assert found['w'].dtype == found['u'].dtype == HALF


@pytest.mark.parametrize('name, sizes, expected', [
    ('bi_wkv_fwd', (128, 196, 384), (14, 14, 1)), ('bi_wkv_bwd', (128, 196, 384), (14, 14, 1)),
    ('wkv_bwd', (128, 49, 384), (8, 7, 1)), ('bi_wkv_fwd', (1, 256, 384), (16, 16, 1)),
    ('bi_wkv_bwd', (1, 256, 384), (16, 16, 1)), ('wkv_fwd', (1, 1, 1), (8, 1, 1)),
    ('bi_wkv_fwd', (1, 16384, 384), (14, 14, 84)), ('wkv_fwd', (1, 1024, 384), (14, 4, 19))])
def test_plans_of_an_h200(monkeypatch, name, sizes, expected):
    monkeypatch.setattr(cuda_launch, 'device_limits', lambda index: (132, 228 << 10, 227 << 10))
    assert cuda_launch.plan_of(0, name, Sizes(*sizes)) == Plan(*expected)


@pytest.mark.parametrize('sectioned', [False, True])
@pytest.mark.parametrize('length, blocks', [(196, 32), (31, 32), (100, 3), (129, 4), (7, 1)])
def test_blocks_of_the_official_mode(place, length, blocks, sectioned, request):
    if sectioned:
        request.getfixturevalue('in_sections')
    inputs, grads = make(bi_wkv, place, 2, length, 3)
    check(bi_wkv, inputs, grads, mode='official', blocks=blocks)
    check(bi_wkv, inputs, grads, mode='official', blocks=blocks, eps=0.1)


def test_long_blocks_of_the_official_mode_are_for_plain_pytorch(place):
    inputs, _ = make(bi_wkv, place, 1, 300, 2)
    with pytest.raises(ValueError, match='300 tokens in 1 blocks; on this GPU the kernels take'):
        bi_wkv(**inputs, mode='official', blocks=1, backend='cuda')
    assert bi_wkv(**inputs, mode='official', blocks=1).isfinite().all()


@pytest.mark.parametrize('length, which, expected', [
    (196, 'fwd', (7, 14, 1, 14, 14, 1)), (196, 'bwd', (7, 14, 1, 14, 14, 1)),
    (256, 'fwd', (8, 16, 1, 16, 16, 1)), (4200, 'bwd', (132, 132, 9, 15, 1, 32)),
    (20, 'fwd', (1, 16, 1, 16, 2, 1)), (1024, 'fwd', (32, 32, 2, 16, 8, 4))])
def test_cuts_of_an_h200(monkeypatch, length, which, expected):
    monkeypatch.setattr(cuda_launch, 'device_limits', lambda index: (132, 228 << 10, 227 << 10))
    assert cuda_launch.cut_of(0, which, length, 32) == expected
