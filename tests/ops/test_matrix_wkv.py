"""What is special about wkv5, wkv6 and wkv7: states, strong decays, flash-linear-attention."""

import sys
from types import ModuleType

import pytest
import torch
from op_specs.matrix_wkv import NAMES6, NAMES7, make6, make7

from vmamba_mm.errors import UserError
from vmamba_mm.ops import bi_wkv6, wkv5, wkv6, wkv6_step, wkv7, wkv7_step
from vmamba_mm.ops.matrix_wkv import fla
from vmamba_mm.testing import assert_close

#: The argument ``op`` is for tests/budget.py.
each_op = pytest.mark.parametrize(
    ('op', 'scan', 'step', 'make'),
    [('wkv6', wkv6, wkv6_step, make6), ('wkv7', wkv7, wkv7_step, make7)], ids=['wkv6', 'wkv7'])


def run(scan, inputs, seed=1, **options):
    """y, the final state and the gradient by every input."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    found = scan(**leaves, return_final_state=True, **options)
    rng = torch.Generator().manual_seed(seed)
    given = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in found]
    return *(t.detach() for t in found), *torch.autograd.grad(found, [*leaves.values()], given)


@each_op
def test_steps_are_the_whole(op, scan, step, make):
    """Also if a part is read at once, and a step leaves its state alone."""
    inputs = make(2, 23, 3, 4, 5)
    expected, last = scan(**inputs, return_final_state=True)
    tokens = {name: t for name, t in inputs.items() if name != 'u'}
    rest = {name: t for name, t in inputs.items() if name == 'u'}
    y, state = scan(**{name: t[:, :20] for name, t in tokens.items()}, **rest,
                  return_final_state=True)
    ys = [y]
    for i in range(20, 23):
        before = state.clone()
        y, new = step(state, **{name: t[:, i] for name, t in tokens.items()}, **rest)
        assert torch.equal(state, before)
        ys, state = [*ys, y.unsqueeze(1)], new
    assert_close(torch.cat(ys, 1), expected, 1e-12)
    assert_close(state, last, 1e-12)


@each_op
def test_a_step_says_what_is_wrong(op, scan, step, make):
    inputs = {name: t if name == 'u' else t[:, 0] for name, t in make(2, 1, 3, 4, 5).items()}
    state = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=f'{step.__name__} expects k of shape'):
        step(state, **inputs | dict(k=inputs['k'][..., 1:]))
    with pytest.raises(ValueError, match=f'{step.__name__} expects state of shape'):
        step(state.mT, **inputs)
    with pytest.raises(ValueError, match=rf'{step.__name__} expects r \(B, H, N\)'):
        step(state, **inputs | dict(r=inputs['r'][0]))


def test_wkv5_has_one_decay_for_all_tokens():
    inputs = make6(2, 35, 3, 4, 5)
    inputs['w'] = inputs['w'][0, 0]
    repeated = inputs | dict(w=inputs['w'].expand(2, 35, 3, 4))
    for one, right in zip(run(wkv5, inputs), run(wkv6, repeated, backend='reference'), strict=True):
        assert_close(one, right.sum((0, 1)) if one.shape == (3, 4) and right.dim() == 4 else right,
                     1e-12)
    with pytest.raises(ValueError, match=r'wkv5 expects w of shape \(3, 4\)'):
        wkv5(**repeated)


@each_op
def test_blocks_of_chunks(op, scan, step, make):
    """As many tokens as are calculated in several blocks, with gradients through their states."""
    inputs = make(2, 150, 4, 64, 3)
    found, expected = (run(scan, inputs, backend=backend) for backend in ('chunked', 'reference'))
    for one, right in zip(found, expected, strict=True):
        assert_close(one, right, 1e-11)


@each_op
@pytest.mark.parametrize('w', [6.0, 90.0, -40.0], ids=['strong', 'all', 'none'])
def test_any_decay_is_safe(op, scan, step, make, w):
    """One token in three has a decay whose factors alone would overflow."""
    inputs = make(1, 50, 2, 4, 4)
    inputs['w'][:, ::3] = w
    expected = run(scan, inputs, backend='reference')
    found = run(scan, {name: t.float() for name, t in inputs.items()})
    for one, right in zip(found, expected, strict=True):
        assert one.isfinite().all()
        if right.isfinite().all():  # by autograd, exp(w) exp(-exp(w)) of 90 is infinity times 0
            assert_close(one, right, 2e-5)


# --- flash-linear-attention, of which a stand-in has the functions that are used ----------------

def stand_in(monkeypatch, **changes):
    """Modules with the functions, as the library's are, but for ``changes`` by name."""
    def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False,
                    cu_seqlens=None, **kwargs):
        scale = r.shape[-1] ** -0.5 if scale is None else scale
        y, state = wkv6(r * scale, k, v, (-w).log(), u, initial_state=initial_state,
                        return_final_state=True, backend='chunked')
        return y, state if output_final_state else None

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False,
                    **kwargs):
        y, state = wkv7(r * scale, (-w).log(), k, v, a, b, initial_state=initial_state,
                        return_final_state=True, backend='chunked')
        return y, state if output_final_state else None

    functions = dict(chunk_rwkv6=chunk_rwkv6, chunk_rwkv7=chunk_rwkv7) | changes
    for name in ('fla', 'fla.ops', 'fla.ops.rwkv6', 'fla.ops.rwkv7'):
        module = ModuleType(name)
        module.__version__ = '0.5.2'
        vars(module).update({k: f for k, f in functions.items() if f and k[-1] == name[-1]})
        monkeypatch.setitem(sys.modules, name, module)
    # Nothing of it stays for other tests.
    monkeypatch.setattr(fla, '_find', fla._find.__wrapped__)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@each_op
def test_fla_gets_its_conventions(op, scan, step, make, dtype, monkeypatch):
    stand_in(monkeypatch)
    inputs = {name: t.to(dtype) for name, t in make(2, 20, 2, 8, 4).items()}
    inputs['initial_state'] = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    found, expected = (run(scan, inputs, backend=backend) for backend in ('fla', 'chunked'))
    for one, right in zip(found, expected, strict=True):
        assert one.dtype == right.dtype
        assert_close(one, right, 1e-5 if dtype == torch.float32 else 2e-2)
    fla._verify.cache_clear()
    with torch.inference_mode():  # in which the comparison has its gradients all the same
        y, _ = scan(**inputs, return_final_state=True, backend='fla')
    assert torch.equal(y, found[0])
    empty = {name: t if name == 'u' else t[:0] for name, t in inputs.items()}
    assert scan(**empty, backend='fla').shape == (0, 20, 2, 4)


def without_scale(r, k, v, w, u, initial_state=None, output_final_state=False, **kwargs):
    raise AssertionError('it must not be called')


def scaled(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    return wkv6(r / 2, k, v, (-w).log(), u, initial_state=initial_state, return_final_state=True)


def of_raw_w(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    return wkv6(r, k, v, w, u, initial_state=initial_state, return_final_state=True)


def with_values_first(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    y, state = wkv6(r, k, v, (-w).log(), u, initial_state=initial_state.mT, return_final_state=True)
    return y, state.mT


def without_gradient(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    return wkv6(r, k, v, (-w).log(), u.detach() + 0 * u, initial_state=initial_state,
                return_final_state=True)


@pytest.mark.parametrize(('function', 'message'), [
    (None, 'needs fla.ops.rwkv6.chunk_rwkv6 of flash-linear-attention, which is not there'),
    (without_scale, "has no argument 'scale'"),
    (scaled, 'chunk_rwkv6 of flash-linear-attention 0.5.2 does not calculate wkv6: y is off by'),
    (of_raw_w, 'does not calculate wkv6: y is off by'),
    (with_values_first, 'does not calculate wkv6: y is off by'),
    (without_gradient, 'does not calculate wkv6: the gradient by u is off by')],
    ids=['absent', 'argument', 'scale', 'decay', 'layout', 'gradient'])
def test_another_fla_is_refused(function, message, monkeypatch):
    """A version that calculates something else, or takes other arguments; and none at all."""
    stand_in(monkeypatch, chunk_rwkv6=function)
    inputs = {name: t.float() for name, t in make6(1, 9, 2, 4, 4).items()}
    with pytest.raises(UserError, match=message) as info:
        wkv6(**inputs, backend='fla')
    assert "backend='chunked'" in str(info.value) and '\n' not in str(info.value)


def test_fla_takes_no_fp64():
    with pytest.raises(ValueError, match="backend='fla' does not take.*float64"):
        wkv6(**make6(1, 2, 1, 2, 2), backend='fla')


def test_fla_is_the_default_for_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fla, 'is_installed', lambda: True)

    class OnGpu:
        device, dtype = torch.device('cuda'), torch.bfloat16

    assert fla.is_default(OnGpu) and not fla.is_default(torch.zeros(1).bfloat16())
    OnGpu.dtype = torch.float32
    assert not fla.is_default(OnGpu)
    OnGpu.dtype = torch.bfloat16
    monkeypatch.setattr(fla, 'is_installed', lambda: False)
    assert not fla.is_default(OnGpu)


def test_names_are_those_of_the_functions():
    assert tuple(make6(1, 1, 1, 1, 1)) == ('r', 'k', 'v', 'w', 'u') == NAMES6[:-1]
    assert sorted(make7(1, 1, 1, 1, 1)) == sorted(NAMES7[:-1])


@pytest.mark.parametrize('length', [1, 2, 21])
def test_both_directions(length):
    """As the sum over all other tokens, with the decays of those between."""
    inputs = make6(2, length, 3, 4, 5)
    r, k, v, w, u = (inputs[name] for name in ('r', 'k', 'v', 'w', 'u'))
    decays, expected = -w.exp(), torch.zeros(2, length, 3, 5, dtype=torch.float64)
    for t in range(length):
        for i in range(length):
            between = decays[:, min(i, t) + 1:max(i, t)].sum(1).exp() if i != t else u
            expected[:, t] += (r[:, t] * between * k[:, i]).sum(-1, keepdim=True) * v[:, i]
    assert_close(bi_wkv6(r, k, v, w, u), expected, 1e-10)
