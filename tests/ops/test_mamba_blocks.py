"""Mamba blocks as one op in inference, the kernels emulated on the CPU, and what keeps them from
it."""

import os
import sys
from functools import partial

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulated_gpu
from torch import nn

import vmamba_mm.layers.mamba_blocks as layers
from vmamba_mm.layers import BiMambaMixer, LayerNorm, MambaBlock, MambaMixer, RMSNorm, run_blocks
from vmamba_mm.testing import assert_close

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux' or emulated_cuda.COMPILER is None and not os.environ.get('CI'),
    reason='needs Linux and a C++ compiler')


@pytest.fixture(autouse=True)
def gpu(compiled):
    with emulated_gpu(compiled):
        yield


@pytest.fixture
def calls(monkeypatch):
    """One number for each call of the op: its blocks."""
    calls, op = [], layers.mamba_blocks
    monkeypatch.setattr(layers, 'mamba_blocks',
                        lambda *args: calls.append(len(args[2])) or op(*args))
    return calls


def make_blocks(mixer=BiMambaMixer, count=3, norm=RMSNorm, **kwargs):
    torch.manual_seed(0)
    blocks = nn.ModuleList(MambaBlock(mixer(16, d_state=16, **kwargs), norm(16), 0.1)
                           for _ in range(count)).eval()
    for block in blocks:
        for p in block.norm.parameters():  # which begin without an effect
            nn.init.uniform_(p, 0.5, 1.5)
    return blocks


def step_by_step(blocks, *streams):
    """Each mixer by itself, as a hook asks for."""
    for block in blocks:
        handle = block.mixer.out_proj.register_forward_hook(lambda *args: None)
        streams = block(*streams)
        handle.remove()
    return streams


each_norm = pytest.mark.parametrize('norm', [RMSNorm, LayerNorm])


@pytest.mark.parametrize('make', [
    partial(make_blocks), partial(make_blocks, reduce='mean'),
    partial(make_blocks, MambaMixer, dt_rank=8), partial(make_blocks, count=1)],
    ids=['sum', 'mean', 'causal', 'one block'])
@each_norm
@pytest.mark.parametrize('begins', [True, False])
def test_as_one_op(make, norm, begins, calls):
    blocks = make(norm=norm)
    streams = torch.randn(2, 7, 16), None if begins else torch.randn(2, 7, 16)
    with torch.no_grad():
        for expected, found in zip(step_by_step(blocks, *streams), run_blocks(blocks, *streams),
                                   strict=True):
            assert_close(found, expected, 1e-5)
    assert calls == [len(blocks)]


@each_norm
def test_half_precision(norm, calls):
    """Under autocast, and with half-precision parameters."""
    blocks, hidden = make_blocks(reduce='mean', norm=norm), torch.randn(2, 7, 16)
    with torch.no_grad():
        expected = step_by_step(blocks, hidden, None)
        with torch.autocast('cpu', torch.float16):
            found = run_blocks(blocks, hidden)
        assert [t.dtype for t in found] == [torch.float16, torch.float32]
        pure = run_blocks(blocks.half(), hidden.half())
        assert [t.dtype for t in pure] == [torch.float16, torch.float32]
    for results in (found, pure):
        for a, b in zip(results, expected, strict=True):
            assert_close(a, b, 1e-2)
    assert calls == [3, 3]


def test_results_are_new_memory():
    """Nothing that comes in is changed or given back."""
    for count in (1, 2):
        for given in (None, torch.randn(2, 5, 16)):
            hidden = torch.randn(2, 5, 16)
            before = hidden.clone(), None if given is None else given.clone()
            with torch.no_grad():
                results = run_blocks(make_blocks(count=count), hidden, given)
            assert torch.equal(hidden, before[0])
            assert given is None or torch.equal(given, before[1])
            pointers = {t.data_ptr() for t in (hidden, given, *results) if t is not None}
            assert len(pointers) == 3 + (given is not None)


@pytest.mark.parametrize('mixer', [BiMambaMixer, MambaMixer])
@each_norm
def test_a_block_with_gradients(mixer, norm, monkeypatch):
    """As one op, beside the steps, which a hook asks for."""
    block, calls, op = make_blocks(mixer, 1, norm)[0], [], layers.mamba_block
    monkeypatch.setattr(layers, 'mamba_block', lambda *args: calls.append(1) or op(*args))
    streams = [torch.randn(2, 7, 16, requires_grad=True) for _ in range(2)]
    leaves = [*streams, *block.parameters()]

    def run():
        results = block(*streams, with_output=True)
        return results, torch.autograd.grad(sum((t.sin() * (i + 1)).sum() for i, t in
                                                enumerate(results)), leaves)

    assert block.why_not_one_op(*streams) is None
    results, grads = run()
    assert calls == [1]
    block.mixer.out_proj.register_forward_hook(lambda *args: None)
    assert 'hook' in block.why_not_one_op(*streams)
    expected, expected_grads = run()
    assert calls == [1]
    for a, b in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert_close(a, b, 1e-4)


def test_what_a_block_with_gradients_cannot_take():
    block, streams = make_blocks(count=1)[0], [torch.randn(1, 3, 16) for _ in range(2)]
    assert 'first block' in block.why_not_one_op(streams[0])
    with torch.autocast('cpu', torch.float16):
        assert 'dtype of matrix products' in block.why_not_one_op(*streams)
        assert block.why_not_one_op(streams[0].half(), streams[1]) is None
    assert 'not float32' in block.why_not_one_op(streams[0], streams[1].half())
    with torch.no_grad():
        assert block.why_not_one_op(streams[0]) is None


@pytest.mark.parametrize('in_one_graph', [False, True])
@pytest.mark.parametrize('name', ['Vim', 'PointMamba', 'DiS'])
def test_a_model_trains(name, in_one_graph, monkeypatch):
    """All blocks but the first as one op each, under torch.compile in one graph."""
    pytest.importorskip('mmengine')
    from vmamba_mm import models

    arch, inputs = {
        'Vim': (dict(base='tiny', depth=3, image_size=32), [torch.randn(2, 3, 32, 32)]),
        'PointMamba': (dict(base='hilbert_g64', depth=3, num_groups=6, group_size=4),
                       [torch.randn(2, 30, 3)]),
        'DiS': (dict(base='small_p2', depth=2, image_size=8, num_classes=0, norm='ln'),
                [torch.randn(2, 4, 8, 8), torch.tensor([3.5, 981])])}[name]
    torch.manual_seed(0)
    model, grads = getattr(models, name)(dict(arch, embed_dims=16), drop_path_rate=0.1), []
    called = torch.compile(model, backend='aot_eager', fullgraph=True) if in_one_graph else model
    seen, op = [], layers.mamba_block
    monkeypatch.setattr(layers, 'mamba_block', lambda *args: seen.append(1) or op(*args))
    for run in (called, model):
        torch.manual_seed(1)
        run(*inputs)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        for block in model.modules():  # then step by step
            if isinstance(block, MambaBlock):
                block.norm.register_forward_hook(lambda *args: None)
    assert len(seen) == 2
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-4)


def test_compiled_for_streams_of_any_size():
    block = make_blocks(count=1)[0]
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True, dynamic=True)
    for size in ((2, 7), (3, 5)):
        streams = [torch.randn(*size, 16, requires_grad=True) for _ in range(2)]
        results = []
        for call in (compiled, block):
            y = sum(t.sin().sum() for t in call(*streams, with_output=True))
            results.append([y, *torch.autograd.grad(y, [*streams, *block.parameters()])])
        for a, b in zip(*results, strict=True):
            assert_close(a, b, 1e-6)


def hooked(blocks):
    blocks[1].mixer.x_proj_b.register_forward_hook(lambda *args: None)


def with_bias(blocks):
    blocks[2].mixer.out_proj = nn.Linear(32, 16)


def with_layer_norm(blocks):
    blocks[0].norm = LayerNorm(16)


def with_norm_of_torch(blocks):
    blocks[0].norm = nn.LayerNorm(16)


def without_norm_bias(blocks):
    for block in blocks:
        block.norm = LayerNorm(16)
        block.norm.bias = None


def dropping(blocks):
    blocks.train()


def other_eps(blocks):
    blocks[1].norm.eps = 1e-6


def other_size(blocks):
    blocks[2].mixer = BiMambaMixer(16, d_state=8)


def normed(blocks):
    blocks[0].mixer = BiMambaMixer(16, out_norm=True)


@pytest.mark.parametrize(('change', 'reason'), [
    (hooked, 'hook'), (with_bias, 'bias more or less'), (with_layer_norm, 'differ in norms'),
    (with_norm_of_torch, 'of another class'), (without_norm_bias, 'lacks its weight or bias'),
    (dropping, 'drops paths'), (other_eps, 'differ in norms'), (other_size, 'shapes or dtypes'),
    (normed, 'a norm or a layer scale')], ids=lambda value: getattr(value, '__name__', ''))
def test_what_keeps_them_from_it(change, reason, calls):
    blocks, hidden = make_blocks(), torch.randn(1, 3, 16)
    with torch.no_grad():
        assert layers.why_not_one_op(blocks, hidden) is None
        change(blocks)
        assert reason in layers.why_not_one_op(blocks, hidden)
        found = run_blocks(blocks, hidden)
        assert set(calls) <= {1}
        if change is not dropping:
            for a, b in zip(found, step_by_step(blocks, hidden, None), strict=True):
                assert_close(a, b, 1e-5)


def test_gradients_keep_them_from_it(calls):
    blocks, hidden = make_blocks(), torch.randn(1, 3, 16)
    assert layers.why_not_one_op(blocks, hidden) == 'gradients are wanted'
    sum(run_blocks(blocks, hidden)).sum().backward()
    assert calls == [] and blocks[0].mixer.in_proj.weight.grad is not None
    with torch.no_grad():
        odd = torch.randn(1, 3, 12)
        reason = layers.why_not_one_op(
            [MambaBlock(MambaMixer(12), RMSNorm(12))], odd)
    assert 'multiples of 8' in reason


def test_a_norm_in_two_dtypes_keeps_them_from_it():
    blocks, hidden = make_blocks(count=1, norm=LayerNorm), torch.randn(1, 3, 16)
    blocks[0].norm.bias.data = blocks[0].norm.bias.data.half()
    with torch.no_grad(), torch.autocast('cpu', torch.float16):
        assert 'different dtypes' in layers.why_not_one_op(blocks, hidden)
        assert run_blocks(blocks, hidden)[0].isfinite().all()


@pytest.mark.parametrize('name', ['Vim', 'VideoMamba', 'ViViM', 'CausalLM', 'PointMamba'])
def test_models_run_them(name, calls):
    """The same result as with a hook on a block, which keeps all from the op."""
    pytest.importorskip('mmengine')
    from vmamba_mm import models

    torch.manual_seed(0)
    model_class = getattr(models, name)
    arch = dict(embed_dims=16, depth=4)
    if name == 'CausalLM':
        arch, x = dict(arch, base='mamba-130m', vocab_size=32), torch.randint(32, (2, 9))
    elif name == 'Vim':
        arch, x = dict(arch, base='tiny', image_size=48), torch.randn(2, 3, 48, 48)
    elif name == 'PointMamba':
        arch = dict(arch, base='hilbert_g64', num_groups=6, group_size=4)
        x = torch.randn(2, 30, 3)
    else:
        arch = dict(arch, **(dict(base='tiny_f8', order='half-spatial-half-temporal')
                             if name == 'VideoMamba' else dict(base='tiny')))
        x = torch.randn(2, 3, 8, 32, 32)
    options = {} if name == 'CausalLM' else dict(out_indices=(1, 3))
    if name == 'PointMamba':  # dropout between the blocks is of training
        options['drop_rate'] = 0.1
    model = model_class(arch, **options).eval()
    with torch.no_grad():
        found = model(x)
        assert calls == ([4] if name == 'CausalLM' else [2, 2])
        for block in model.blocks:
            block.mixer.in_proj.register_forward_hook(lambda *args: None)
        expected = model(x)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)
    assert len(calls) <= 2


class Streams(nn.Module):
    """One tensor in, one out: all that torch.jit.trace takes."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return sum(run_blocks(self.blocks, x))


@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no-grad'])
@pytest.mark.parametrize('mixer', [BiMambaMixer, MambaMixer])
def test_traced_with_and_without_gradients(mixer, grad):
    model, x = Streams(make_blocks(mixer)), torch.randn(1, 5, 16)

    def gradients(function):
        model.zero_grad()
        function(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    for found, wanted in zip(gradients(traced), expected, strict=True):
        assert_close(found, wanted, 1e-5)


def test_traced_for_inference_alone():
    model, x = Streams(make_blocks()).requires_grad_(False), torch.randn(1, 5, 16)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert_close(traced(x), model(x), 1e-6)
    with pytest.raises(RuntimeError, match='mamba_blocks has no backward'):
        traced(x.requires_grad_()).sum().backward()
