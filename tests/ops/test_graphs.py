"""Blocks whose launches are replayed: what decides it, and the same results to the bit."""

import importlib.util

import pytest
import torch

from vmamba_mm.layers import BiMambaMixer, LayerNorm, MambaBlock, MambaMixer, RMSNorm, VSSBlock
from vmamba_mm.ops.core import graphs

needs_gpu = pytest.mark.gpu
SIZES = (3, 15, 10, 192), (2, 9, 11, 32)


# --- what decides it ----------------------------------------------------------------------------

@pytest.fixture
def actions(monkeypatch):
    """What was done: 'launched', 'made', 'replayed'."""
    done = []

    class Graph:
        def __init__(self, index, launch):
            done.append('made')

        def __call__(self):
            done.append('replayed')

    monkeypatch.setattr(graphs, 'Graph', Graph)
    monkeypatch.setattr(graphs, 'is_current_stream_capturing', lambda: False)
    graphs.clear()
    yield done
    graphs.clear()


def call(actions, *key):
    """What a call does."""
    actions.clear()
    graphs.replay(0, key, lambda: actions.append('launched'))
    return list(actions)


def test_the_third_time_is_a_graph(actions, monkeypatch):
    expected = [['launched'], ['launched'], ['made', 'replayed'], ['replayed'], ['replayed']]
    assert [call(actions, 'one', 1) for _ in range(5)] == expected
    assert [call(actions, 'one', 2) for _ in range(5)] == expected
    with monkeypatch.context() as patch:
        patch.setattr(graphs, 'is_current_stream_capturing', lambda: True)
        assert call(actions, 'one', 1) == ['launched']
    monkeypatch.setattr(graphs, 'ENABLED', False)
    assert call(actions, 'one', 1) == ['launched']


@pytest.mark.parametrize('value, enabled', [('0', False), ('1', True), (None, True)])
def test_the_switch_in_the_environment(value, enabled, monkeypatch):
    monkeypatch.delenv('VMAMBA_MM_GRAPHS', raising=False)
    if value:
        monkeypatch.setenv('VMAMBA_MM_GRAPHS', value)
    spec = importlib.util.find_spec(graphs.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ENABLED == enabled


def test_what_was_not_used_for_longest_is_forgotten(actions):
    for _ in range(3):
        call(actions, 'used')
    for key in range(graphs.MOST):
        assert call(actions, key) == ['launched']
        if key < graphs.MOST - 1:
            assert call(actions, 'used') == ['replayed']
    assert call(actions, 0) == ['launched'] == call(actions, 0)  # its first time was forgotten


def test_graphs_must_be_earned(actions):
    """Addresses that come three times and never again."""
    made = 0
    for key in range(2 * graphs.FREE):
        made += sum('made' in call(actions, key) for _ in range(3))
    # The replay of each that was made counts too.
    replays = graphs.REPLAYS_PER_GRAPH
    assert graphs.FREE <= made <= graphs.FREE * replays / (replays - 1) + 1
    for _ in range(3 * replays):
        call(actions, 0)
    for _ in range(3):
        last = call(actions, 'another')
    assert last == ['made', 'replayed']


# --- blocks on a GPU ----------------------------------------------------------------------------

@pytest.fixture
def replays(monkeypatch):
    """A list to which a replay appends 1."""
    monkeypatch.setattr(graphs, 'FREE', 10**9)
    done, run = [], graphs.Graph.__call__
    monkeypatch.setattr(graphs.Graph, '__call__', lambda self: done.append(1) or run(self))
    graphs.clear()
    return done


def make_block(dim, drop_path=0.0, mlp_ratio=4.0, **ssm_cfg):
    torch.manual_seed(0)
    return VSSBlock(dim, mlp_ratio=mlp_ratio, drop_path=drop_path, with_cp=False,
                    ssm_cfg=dict(conv_bias=True, **ssm_cfg)).to('cuda')


def run(block, x, half, backward):
    """[y, and gradients], on the CPU so that the next call gets the same memory."""
    # What lies in that memory is NaN.
    for size in (2**20, 2**24, 2**27):
        torch.empty(size, device='cuda').fill_(torch.nan)
    with torch.autocast('cuda', torch.float16, enabled=half):
        if not backward:
            with torch.inference_mode():
                return [block(x).cpu()]
        y = block(x)
    rng = torch.Generator('cuda').manual_seed(1)
    grad_y = torch.randn(y.shape, generator=rng, device='cuda').to(y.dtype)
    grads = torch.autograd.grad(y, [x, *block.parameters()], grad_y)
    return [t.cpu() for t in (y.detach(), *grads)]


def run_often(block, x, half, backward, seeds):
    """Each time with other numbers in the same memory, parameters too."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_()
            for parameter in block.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        found.append(run(block, x, half, backward))
    return found


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize('shape', SIZES, ids=str)
@pytest.mark.parametrize('half', [True, False], ids=['fp16', 'fp32'])
@pytest.mark.parametrize('backward', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('drop_path', [0.0, 0.4])
def test_a_block_in_a_loop(monkeypatch, replays, shape, half, backward, drop_path):
    check_loop(monkeypatch, replays, shape, half, backward, drop_path)


@needs_gpu
@pytest.mark.parametrize('half', [True, False], ids=['fp16', 'fp32'])
@pytest.mark.parametrize('backward', [False, True], ids=['inference', 'training'])
def test_a_vanilla_block_in_a_loop(monkeypatch, replays, half, backward):
    """Of so many channels that torch adds up parts of a gradient within the graph."""
    check_loop(monkeypatch, replays, (3, 7, 9, 128), half, backward, 0.4, mlp_ratio=0.0, gate=True,
               ssm_ratio=2.0, d_state=16)


class MambaStreams(torch.nn.Module):
    """A block that is not the first: one tensor in, one out."""

    def __init__(self, dim, mixer, norm):
        super().__init__()
        torch.manual_seed(0)
        self.block = MambaBlock(mixer(dim), norm(dim)).to('cuda')

    def forward(self, x):
        hidden = x.half() if torch.is_autocast_enabled('cuda') else x
        assert self.block.why_not_one_op(hidden, x) is None
        return sum(self.block(hidden, x))


@needs_gpu
@pytest.mark.parametrize('shape', [(3, 129, 384), (2, 37, 40)], ids=str)
@pytest.mark.parametrize(('norm', 'mixer'), [
    (LayerNorm, MambaMixer), (LayerNorm, BiMambaMixer), (RMSNorm, BiMambaMixer)])
@pytest.mark.parametrize('half', [True, False], ids=['fp16', 'fp32'])
@pytest.mark.parametrize('backward', [False, True], ids=['inference', 'training'])
def test_a_mamba_block_in_a_loop(monkeypatch, replays, shape, norm, mixer, half, backward):
    check(monkeypatch, replays, lambda: MambaStreams(shape[2], mixer, norm), shape, half, backward)


def check_loop(monkeypatch, replays, shape, half, backward, drop_path, **options):
    check(monkeypatch, replays, lambda: make_block(shape[3], drop_path, **options), shape, half,
          backward)


def check(monkeypatch, replays, make, shape, half, backward):
    """Replays are equal to the bit to what is launched as it is."""
    results = []
    for worth_it in (graphs.WORTH_IT, 10**9):
        monkeypatch.setattr(graphs, 'WORTH_IT', worth_it)
        block = make().train(backward)
        x = torch.zeros(shape, device='cuda', requires_grad=backward)
        results.append(run_often(block, x, half, backward, range(8)))
        count = len(replays)
    assert_equal(*results)
    assert count == len(replays) >= (4 if backward else 2)


@needs_gpu
def test_other_parameters_sizes_and_memory(replays):
    """Nothing of an earlier call is left in a graph."""
    block, other = make_block(32), make_block(32)
    for parameter in other.parameters():
        parameter.data.add_(0.1)
    inputs = [torch.randn(2, 9, 11, 32, device='cuda'), torch.randn(2, 9, 11, 32, device='cuda'),
              torch.randn(1, 7, 11, 32, device='cuda')]
    cases = [(module, x) for module in (block, other) for x in inputs]
    expected = [run(*case, True, False) for case in cases]
    assert not replays
    for _ in range(5):
        assert_equal([run(*case, True, False) for case in cases], expected)
    assert len(replays) >= 2 * len(cases)
    before = run(block, inputs[0], True, False)
    for parameter, new in zip(block.parameters(), other.parameters(), strict=True):
        parameter.data = new.data.clone()
    assert_equal([run(block, inputs[0], True, False)], [expected[3]])
    assert not torch.equal(before[0], expected[3][0])


@needs_gpu
def test_a_capture_has_no_replay_in_it(replays):
    block, x = make_block(32), torch.randn(2, 9, 11, 32, device='cuda')
    expected = [run(block, x, True, False) for _ in range(6)][0]
    count = len(replays)
    assert count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode(), torch.autocast('cuda', torch.float16):
        y = block(x)
    assert len(replays) == count
    with torch.inference_mode():
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y.cpu(), expected[0])


@needs_gpu
@pytest.mark.alone
def test_memory_of_graphs(replays):
    """136 KiB each, measured."""
    block = make_block(32)
    inputs = [torch.randn(1, 7, 11, 32, device='cuda') for _ in range(256)]
    for x in inputs[:8]:
        for _ in range(4):
            run(block, x, True, False)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for x in inputs:
        for _ in range(4):
            run(block, x, True, False)
    torch.cuda.synchronize()
    used = free - torch.cuda.mem_get_info()[0]
    assert len(replays) >= 256
    assert used <= 256 * 256 * 1024
