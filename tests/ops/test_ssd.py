"""What is special about ``ssd``: three modes, chunks, packed sequences, decays, tokens in a row."""

import math

import pytest
import torch
from op_specs import ssd as specs

from vmamba_mm.ops import selective_scan, ssd, ssd_step
from vmamba_mm.ops.ssd import chunked, chunks, reference
from vmamba_mm.testing import assert_close, relative_error

DOUBLE, SINGLE = torch.float64, torch.float32
OPTIONS = dict(dt_softplus=True, return_final_state=True)
TOKENS = 'x', 'dt', 'B', 'C', 'z'


def make(*shape, dtype=DOUBLE):
    """(batch, length, heads, dim, groups, state) -> all inputs of :func:`ssd` but seq_idx."""
    return {name: t.to(dtype) for name, t in specs.make_stateful(*shape).items()}


def packed(batch, length, first=0):
    """Indices of packed sequences of uneven lengths; an index comes again."""
    index = torch.tensor([first, first, first, 5, 0, 0, 7, 7, 7, 7]).repeat(length // 10 + 1)
    return torch.stack([index[i:i + length] for i in range(batch)]).int()


def with_grads(function, inputs, *args, **kwargs):
    """Both results, and the gradients of all inputs for fixed gradients by the results."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    results = function(leaves, *args, **kwargs)
    rng = torch.Generator().manual_seed(3)
    given = [torch.randn(t.shape, generator=rng, dtype=DOUBLE).to(t) for t in results]
    grads = torch.autograd.grad(results, list(leaves.values()), given)
    return dict(zip(('y', 'final_state', *leaves), (*results, *grads), strict=True))


def arguments(inputs, seq_idx=None, limit=(0.0, math.inf), reverse=False):
    return (*map(inputs.get, specs.NAMES), seq_idx, True, *limit, True, reverse)


# --- three modes --------------------------------------------------------------------------------

CASES = {'usual': {}, 'packed': dict(seq_idx=packed(2, 37)),
         'packed, another first': dict(seq_idx=packed(2, 37, first=4)),
         'limits': dict(limit=(0.3, 0.9)), 'reversed': dict(reverse=True),
         'all': dict(seq_idx=packed(2, 37), limit=(0.3, 0.9), reverse=True)}


@pytest.mark.parametrize('strong', [False, True], ids=['', 'strong decay'])
@pytest.mark.parametrize('case', CASES)
def test_three_modes_agree(case, strong):
    inputs = make(2, 37, 4, 3, 2, 5)
    if strong:
        inputs['A'] = inputs['A'] * torch.tensor([1, 50, 300, 1e4], dtype=DOUBLE)

    def run(leaves, **mode):
        return reference.forward(*arguments(leaves, **CASES[case]), **mode)

    expected = with_grads(run, inputs)
    modes = [dict(mode='quadratic'), *(dict(mode='chunked', chunk_len=n) for n in (1, 8, 37, 64))]
    for mode in modes:
        for name, found in with_grads(run, inputs, **mode).items():
            assert_close(found, expected[name], 1e-12, f'{name} {mode}')


@pytest.mark.parametrize('strong', [False, True], ids=['', 'strong decay'])
@pytest.mark.parametrize('case', CASES)
def test_any_chunks(case, strong, monkeypatch):
    """Of the quick form: of any length, alone in a block and many together."""
    inputs = make(2, 37, 4, 3, 2, 5)
    if strong:
        inputs['A'] = inputs['A'] * torch.tensor([1, 50, 300, 1e4], dtype=DOUBLE)
    args = arguments(inputs, **CASES[case])
    expected = with_grads(lambda leaves: reference.forward(*arguments(leaves, **CASES[case])),
                          inputs)
    rng = torch.Generator().manual_seed(3)
    given = [torch.randn(expected[name].shape, generator=rng, dtype=DOUBLE)
             for name in ('y', 'final_state')]
    for size in (1, 1 << 9, 1 << 20):
        monkeypatch.setattr(chunks, '_CPU_BLOCK', size)
        for chunk_len in (1, 8, 13, 37, 64, None):
            results = chunked.forward(*args, chunk_len=chunk_len)
            grads = chunked.backward(*given, *args, chunk_len=chunk_len)
            for name, found in zip(expected, (*results, *grads), strict=True):
                assert_close(found, expected[name], 2e-12, f'{name} {size} {chunk_len}')


def test_it_is_s6_with_one_decay_for_a_head():
    """The op of Mamba, with dt and A repeated for all channels and states of a head."""
    inputs = make(2, 19, 4, 3, 2, 5)
    x, dt, A, B, C, z = (inputs[name] for name in ('x', 'dt', 'A', 'B', 'C', 'z'))
    expected, state = selective_scan(
        x.flatten(2).mT, dt.repeat_interleave(3, 2).mT,
        A.repeat_interleave(3)[:, None].expand(12, 5), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1),
        inputs['D'].flatten(), z=z.flatten(2).mT, delta_softplus=True, return_final_state=True,
        delta_bias=inputs['dt_bias'].repeat_interleave(3),
        initial_state=inputs['initial_state'].flatten(1, 2))
    y, final = ssd(**inputs, **OPTIONS)
    assert_close(y.flatten(2).mT, expected, 1e-12)
    assert_close(final.flatten(1, 2), state, 1e-12)


def test_it_is_retention_with_a_constant_decay():
    """RetNet's parallel form (arXiv 2307.08621, equation 5): gamma to the distance of tokens."""
    q, k, v = torch.randn(3, 2, 21, 3, 4, dtype=DOUBLE)
    gamma = torch.tensor([0.5, 0.9, 0.99], dtype=DOUBLE)
    time = torch.arange(21)
    mask = (gamma[:, None, None] ** (time[:, None] - time).clamp_min(0)).tril()
    expected = torch.einsum('bthn,bshn,hts,bshp->bthp', q, k, mask, v)
    assert_close(ssd(v, torch.ones_like(v[..., 0]), gamma.log(), k, q), expected, 1e-12)
    out = torch.empty_like(expected)
    chunks.scan(v, gamma.log().expand(2, 21, 3), None, k, q, None, None, False,
                False, lambda block, v, y: block.put(out, y), chunk_len=8)
    assert_close(out, expected, 1e-12)


# --- packed sequences ---------------------------------------------------------------------------

@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('reverse', [False, True])
def test_packed_sequences_are_those_alone(backend, reverse):
    inputs = make(1, 30, 4, 3, 2, 5)
    pieces = [slice(0, 7), slice(7, 8), slice(8, 30)]
    index = torch.empty(1, 30, dtype=torch.int64)
    for i, piece in enumerate(pieces):
        index[:, piece] = 2 - i if reverse else i  # the first in time has index 0
    options = dict(OPTIONS, reverse=reverse, backend=backend)
    y, final = ssd(**inputs, seq_idx=index, **options)
    alone = []
    for i, piece in enumerate(pieces):
        first = i == (2 if reverse else 0)
        part = {name: t[:, piece] if name in TOKENS else t for name, t in inputs.items()}
        alone.append(ssd(**part | ({} if first else dict(initial_state=None)), **options))
    assert_close(y, torch.cat([one for one, _ in alone], 1), 1e-12)
    assert_close(final, alone[0 if reverse else 2][1], 1e-12)


# --- tokens in a row, pieces --------------------------------------------------------------------

@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('reverse', [False, True])
def test_in_pieces_it_is_the_same(backend, reverse):
    inputs = make(2, 90, 4, 3, 2, 5)
    options = dict(OPTIONS, reverse=reverse, backend=backend)
    whole, last = ssd(**inputs, **options)
    pieces = [slice(0, 1), slice(1, 20), slice(20, 90)]
    ys, state = {}, inputs['initial_state']
    for piece in pieces[::-1] if reverse else pieces:
        part = {name: t[:, piece] if name in TOKENS else t for name, t in inputs.items()}
        ys[piece.start], state = ssd(**part | dict(initial_state=state), **options)
    assert_close(torch.cat([ys[piece.start] for piece in pieces], 1), whole, 1e-12)
    assert_close(state, last, 1e-12)


def run_steps(inputs, **options):
    inputs, state = dict(inputs), inputs['initial_state']
    ys = []
    for t in range(inputs['x'].shape[1]):
        token = {name: v[:, t] if name in TOKENS else v for name, v in inputs.items()
                 if name != 'initial_state'}
        before = state.clone()
        y, new = ssd_step(state, **token, **options)
        assert torch.equal(state, before)
        ys.append(y)
        state = new
    return torch.stack(ys, 1), state


@pytest.mark.parametrize('absent', [(), ('z', 'D', 'dt_bias')], ids=['all', 'bare'])
def test_steps_are_the_scan(absent):
    """With gradients, and with limits, which the official step ignores."""
    inputs = {name: t for name, t in make(2, 9, 4, 3, 2, 5).items() if name not in absent}
    options = dict(dt_softplus=True, dt_limit=(0.3, 0.9))
    expected = with_grads(lambda leaves: ssd(**leaves, return_final_state=True, **options), inputs)
    found = with_grads(lambda leaves: run_steps(leaves, **options), inputs)
    for name, right in expected.items():
        assert_close(found[name], right, 1e-12, name)


def test_a_step_with_a_skip_for_each_head():
    inputs = make(2, 4, 4, 3, 2, 5)
    inputs['D'] = inputs['D'][:, 0]
    y, _ = ssd(**inputs, **OPTIONS)
    assert_close(run_steps(inputs, dt_softplus=True)[0], y, 1e-12)


def test_step_names_wrong_shapes_and_compiles():
    state, x, B = torch.zeros(2, 8, 4, 6), torch.randn(2, 8, 4), torch.randn(2, 2, 6)
    dt, A = torch.rand(2, 8), -torch.rand(8)
    with pytest.raises(ValueError, match=r'expects state of shape \(2, 8, 4, 6\).*got'):
        ssd_step(state[..., 1:], x, dt, A, B, B)
    with pytest.raises(ValueError, match=r'expects x \(B, H, P\)'):
        ssd_step(state, x[0], dt, A, B, B)
    compiled = torch.compile(ssd_step, fullgraph=True, backend='aot_eager')
    for one, right in zip(compiled(state, x, dt, A, B, B, dt_softplus=True),
                          ssd_step(state, x, dt, A, B, B, dt_softplus=True), strict=True):
        assert_close(one, right, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_states_are_single_in_half_precision(dtype):
    inputs = make(1, 90, 2, 3, 1, 4)
    inputs = {name: t.to(dtype if name in TOKENS else SINGLE) for name, t in inputs.items()}
    _, right = ssd(**{name: t.double() for name, t in inputs.items()}, **OPTIONS)
    with torch.autocast('cpu', torch.bfloat16):
        y, state = ssd(**inputs, **OPTIONS)
        first, last = ssd_step(inputs['initial_state'], **{
            name: t[:, 0] if name in TOKENS else t for name, t in inputs.items()
            if name != 'initial_state'}, dt_softplus=True)
    _, after = ssd(**{name: t[:, :1].double() if name in TOKENS else t.double()
                      for name, t in inputs.items()}, **OPTIONS)
    assert y.dtype == first.dtype == dtype and state.dtype == last.dtype == SINGLE
    assert_close(state, right, 1e-5)
    assert_close(last, after, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, 5, 2, 3, 1, 2), (2, 150, 4, 32, 2, 16)], ids=str)
def test_half_precision_of_gpus(shape, dtype, monkeypatch):
    """What is multiplied is rounded to half precision there: at most twice the error of a scan that
    rounds its results alone, or two roundings."""
    inputs = {name: t.to(dtype if name in TOKENS else SINGLE)
              for name, t in make(*shape).items()}

    def run(leaves, backend):
        return ssd(**leaves, backend=backend, **OPTIONS)

    expected = with_grads(run, {name: t.double() for name, t in inputs.items()}, 'reference')
    naive = with_grads(run, inputs, 'reference')
    in_single = ssd(**inputs, **OPTIONS)[0]
    monkeypatch.setattr(chunks, 'operand_dtype', lambda *tensors: dtype)
    found = with_grads(run, inputs, 'chunked')
    assert not torch.equal(found['y'], in_single)
    for name, right in expected.items():
        errors = [((one[name].double() - right).norm() / right.norm()).item()
                  for one in (found, naive)]
        assert errors[0] <= 2 * max(errors[1], torch.finfo(dtype).eps), name
    assert found['final_state'].dtype == SINGLE


@pytest.mark.gpu(nvidia=True)
@pytest.mark.parametrize('dtype', [SINGLE, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', [(3, 196, 12, 64, 1, 64), (1, 3000, 4, 32, 2, 16)], ids=str)
def test_chunked_on_a_gpu(shape, dtype, monkeypatch):
    """In one block and in many, with padding."""
    inputs = {name: t.to('cuda', dtype if name in TOKENS else SINGLE)
              for name, t in make(*shape).items()}
    index = packed(shape[0], shape[1]).cuda()

    def run(leaves, **options):
        return ssd(**leaves, seq_idx=index, backend='chunked', **OPTIONS, **options)

    for reverse in (False, True):
        expected = with_grads(run, {name: t.double() for name, t in inputs.items()},
                              reverse=reverse)
        for size in (1 << 16, 1 << 24):
            monkeypatch.setattr(chunks, '_GPU_BLOCK', size)
            found = with_grads(run, inputs, reverse=reverse)
            for name, right in expected.items():
                difference = (found[name].double() - right).norm()
                limit = 1e-5 if dtype == SINGLE else 2 * torch.finfo(dtype).eps
                assert difference <= limit * right.norm(), name  # 0 past the end of a sequence


# --- dt and decays ------------------------------------------------------------------------------

def test_dt_is_limited_after_softplus_and_has_no_gradient_there():
    """Without softplus a negative dt counts as 0; above 20 softplus is the identity."""
    x, B = torch.ones(1, 1, 1, 1, dtype=DOUBLE), torch.ones(1, 1, 1, 1, dtype=DOUBLE)
    zero = torch.zeros(1, dtype=DOUBLE)
    for raw, options, value, slope in (
            (-0.5, {}, 0, 0), (0.5, {}, 0.5, 1), (2, dict(dt_limit=(0.1, 0.9)), 0.9, 0),
            (0.05, dict(dt_limit=(0.1, 0.9)), 0.1, 0), (0, dict(dt_softplus=True), math.log(2), .5),
            (21, dict(dt_softplus=True), 21, 1),
            (-9, dict(dt_softplus=True, dt_limit=(0.01, 1)), 0.01, 0)):
        for backend in ('reference', 'chunked'):
            dt = torch.full((1, 1, 1), float(raw), dtype=DOUBLE, requires_grad=True)
            y = ssd(x, dt, zero, B, B, backend=backend, **options)
            y.sum().backward()
            assert y.item() == pytest.approx(value, abs=1e-15), raw
            assert dt.grad.item() == pytest.approx(slope, abs=1e-15), raw


@pytest.mark.parametrize('wide', [False, True], ids=['weak', 'mixed'])
@pytest.mark.parametrize('scale', [1e-3, 1., 30., 1e4])
def test_decays_in_single_precision(scale, wide):
    """From none to total, and both in turn: no NaN, and what neighbours see of each other is not
    lost in large sums."""
    inputs = make(2, 200, 4, 3, 2, 5)
    inputs['A'] = -torch.rand(4, dtype=DOUBLE) * scale
    if wide:
        inputs['dt'][:, ::7] += 30
        inputs['dt'][:, 1::2] -= 5
    inputs = {name: t.float() for name, t in inputs.items()}

    def run(leaves, backend):
        return ssd(**leaves, backend=backend, **OPTIONS)

    expected = with_grads(run, {name: t.double() for name, t in inputs.items()}, 'chunked')
    found = with_grads(run, inputs, 'chunked')
    naive = with_grads(run, inputs, 'reference')
    for name, right in expected.items():
        assert found[name].isfinite().all(), name
        limit = max(1e-5, 2 * relative_error(naive[name], right))
        assert_close(found[name], right, limit, name)


def test_total_decay_forgets_the_first_state():
    inputs = make(1, 9, 2, 3, 1, 4, dtype=SINGLE)
    inputs['A'] = torch.full_like(inputs['A'], -1e6)
    inputs['dt'] = inputs['dt'].abs() + 1
    state = inputs.pop('initial_state').requires_grad_()
    y, last = ssd(**inputs, initial_state=state, **OPTIONS)
    without, same = ssd(**inputs, **OPTIONS)
    assert torch.equal(y, without) and torch.equal(last, same)
    by_state, = torch.autograd.grad(y.sum() + last.sum(), state)
    assert torch.equal(by_state, torch.zeros_like(state))


# --- the rest -----------------------------------------------------------------------------------

def test_only_the_final_state_may_be_used():
    inputs = {name: t for name, t in make(1, 70, 2, 3, 1, 4).items() if name not in 'CDz'}

    def run(leaves, backend):
        C = torch.ones_like(leaves['B'])
        return ssd(**leaves, C=C, backend=backend, **OPTIONS)[1:]

    found, expected = ({name: g for name, g in zip(inputs, torch.autograd.grad(
        run(leaves, backend)[0].square().sum(), list(leaves.values())), strict=True)}
        for backend in ('chunked', 'reference')
        for leaves in [{name: t.clone().requires_grad_() for name, t in inputs.items()}])
    for name, right in expected.items():
        assert_close(found[name], right, 1e-12, name)


def test_transforms_see_the_states():
    inputs = make(2, 6, 2, 3, 1, 4)
    index = packed(2, 6)

    def run(x, state):
        return ssd(**inputs | dict(x=x, initial_state=state), seq_idx=index, **OPTIONS)

    x, state = torch.randn(3, 2, 6, 2, 3, dtype=DOUBLE), torch.randn(3, 2, 2, 3, 4, dtype=DOUBLE)
    for i, results in enumerate(zip(*torch.func.vmap(run)(x, state), strict=True)):
        for one, right in zip(results, run(x[i], state[i]), strict=True):
            assert_close(one, right, 1e-12)


def test_wrong_values_are_named():
    inputs = make(2, 6, 2, 3, 1, 4)
    with pytest.raises(ValueError, match=r'expects seq_idx of shape \(2, 6\).*got \(2, 5\)'):
        ssd(**inputs, seq_idx=packed(2, 5))
    with pytest.raises(ValueError, match='expects seq_idx of integers, got torch.float32'):
        ssd(**inputs, seq_idx=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r'expects dt_limit \(least, largest\), got \(2, 1\)'):
        ssd(**inputs, dt_limit=(2, 1))


def test_nothing_grows_with_the_square_of_the_length(monkeypatch):
    """No tensor of a long sequence has many more numbers than its input or a block."""
    inputs = make(1, 3000, 2, 4, 1, 4, dtype=SINGLE)
    monkeypatch.setattr(chunks, '_CPU_BLOCK', 1 << 15)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(found):
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return found

    args = arguments(inputs)
    with Largest() as largest:
        y, state = chunked.forward(*args)
        chunked.backward(y, state, *args)
    assert largest.numbers <= 1 << 15
