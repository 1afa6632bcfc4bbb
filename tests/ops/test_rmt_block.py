"""Blocks of RMT as one op beside the same step by step, the kernels on a GPU or emulated on the
CPU; and what keeps a block from it. The op by itself is in op_specs/rmt_block.py."""

import copy

import pytest
import torch
from test_graphs import needs_gpu, replays  # noqa: F401 (a fixture)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vmamba_mm.families.rmt import ARCHS, DEFAULTS
from vmamba_mm.ops.core import graphs
from vmamba_mm.testing import assert_close, relative_error

rmt = pytest.importorskip('vmamba_mm.models.rmt')
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
LIMITS = {HALF: 2e-3, BRAIN: 1.6e-2, SINGLE: 1e-5}  # of what is rounded several times
#: form, heads, their channels, and the map
SHAPES = [('decomposed', 2, 16, (2, 5, 7)), ('whole', 1, 32, (3, 3, 4))]


class Placed(nn.Module):
    """A block that finds the places of its pixels itself."""

    def __init__(self, form, heads, head_dim, layer_scale=0.0, drop_path=0.0, with_cp=False):
        super().__init__()
        self.block = rmt.RMTBlock(heads * head_dim, heads, form, mlp_ratio=1.5, drop_path=drop_path,
                                  layer_scale=layer_scale, with_cp=with_cp)
        self.register_buffer('decay', rmt.make_decay(heads))
        self.head_dim = head_dim

    def places(self, x):
        return rmt.place(x, self.decay, self.head_dim, self.block.attn.form)

    def forward(self, x):
        return self.block(x, self.places(x))

    def why_not(self, x):
        return self.block.why_not_one_op(x, self.places(x))


def make(device, form='decomposed', heads=2, head_dim=16, **kwargs):
    torch.manual_seed(0)
    model = Placed(form, heads, head_dim, **kwargs).to(device)
    for name, parameter in model.named_parameters():
        if 'norm' in name or 'gamma' in name:
            parameter.data.normal_(mean=0.5)
    return model


@pytest.fixture
def calls(place, monkeypatch):
    """A list to which a call of the op appends 1."""
    calls, op = [], rmt.rmt_block
    monkeypatch.setattr(rmt, 'rmt_block', lambda *args: calls.append(1) or op(*args))
    return calls


def run(model, x):
    """[y, and gradients by x and the parameters] for a fixed seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # of drop path
    y = model(x)
    rng = torch.Generator().manual_seed(2)
    grad = torch.randn(y.shape, generator=rng).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]


def names_of(model):
    return ['y', 'x', *(name for name, _ in model.named_parameters())]


@pytest.mark.parametrize('dtype', [HALF, BRAIN, SINGLE], ids=['fp16', 'bf16', 'fp32'])
@pytest.mark.parametrize('options', [{}, dict(layer_scale=0.5), dict(drop_path=0.5)],
                         ids=['plain', 'layer scale', 'drop path'])
@pytest.mark.parametrize('form, heads, head_dim, size', SHAPES, ids=['decomposed', 'whole'])
def test_as_step_by_step(place, calls, form, heads, head_dim, size, options, dtype):
    """Which a hook brings back; in inference too, and under autocast with maps of both dtypes."""
    model, x = make(place, form, heads, head_dim, **options), torch.randn(
        *size, heads * head_dim).to(place)
    exact = run(copy.deepcopy(model).double(), x.double())
    assert not calls
    for x_dtype in {SINGLE, dtype}:
        for hooked in (False, True):
            model.eval()
            handle = model.block.mlp.fc1.register_forward_hook(lambda *args: None)
            if not hooked:
                handle.remove()
            with torch.autocast(place, HALF if dtype == SINGLE else dtype,
                                enabled=dtype != SINGLE):
                with torch.no_grad():
                    inferred = model(x.to(x_dtype))
                found = run(model.train(), x.to(x_dtype))
            handle.remove()
            if hooked:
                steps, inferred_by_steps = found, inferred
            else:
                one_op, inferred_by_op = found, inferred
        assert len(calls) == 2
        calls.clear()
        for name, one, other, right in zip(names_of(model), one_op, steps, exact, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape, name
            limit = max(2 * relative_error(other, right), LIMITS[dtype])
            assert relative_error(one, right) <= limit, name
        assert_close(inferred_by_op, inferred_by_steps, 1e-5 if dtype == SINGLE else 0.02)


def test_recomputed(place, calls):
    results = []
    for with_cp in (False, True):
        model = make(place, drop_path=0.5, with_cp=with_cp)
        with torch.autocast(place, HALF):
            results.append(run(model, torch.randn(
                3, 4, 5, 32, generator=torch.Generator().manual_seed(0)).to(place)))
    assert all(map(torch.equal, *results))
    assert len(calls) == 3  # one of them again, in the backward


def test_compiled_as_one_op_in_one_graph_for_all_sizes(place):
    model = nn.Sequential(make(place), make(place, layer_scale=0.5, drop_path=0.3)).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in ((2, 5, 7), (3, 4, 6)):
        x = torch.randn(*size, 32, device=place)
        with torch.autocast(place, HALF):
            for one, other in zip(run(compiled, x), run(model, x), strict=True):
                assert_close(one, other, 1e-6)
    ops = [node.target.name() for graph in counter.graphs for node in graph.graph.nodes
           if 'vmamba_mm' in str(node.target)]
    assert ops == ['vmamba_mm::rmt_block'] * 2


def test_gradients_by_some_parameters_alone(place, calls):
    """As where a part of a model is frozen, or its input is an image."""
    model, x = make(place), torch.randn(2, 3, 5, 32, device=place)
    everything = dict(zip(names_of(model)[2:], run(model, x)[2:], strict=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('mlp' in name)
    torch.manual_seed(1)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ('mlp' in name)
        if parameter.grad is not None:
            assert_close(parameter.grad, everything[name], 1e-6, name)
    assert len(calls) == 2


def hooked(model):
    model.block.attn.k_proj.register_forward_hook(lambda *args: None)


def hooked_drop_path(model):
    model.block.drop_path.register_forward_pre_hook(lambda *args: None)


def adapted(model):
    fc1 = model.block.mlp.fc1
    fc1.forward = lambda x: nn.Linear.forward(fc1, x)


class OtherMlp(rmt.ConvMlp):
    pass


def subclassed(model):
    model.block.mlp = OtherMlp(32, 48)


def without_bias(model):
    model.block.attn.v_proj = nn.Linear(32, 32, bias=False)


def dilated(model):
    model.block.pos = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)


def other_eps(model):
    model.block.norm2.eps = 1e-3


def half_factor(model):
    model.block.mlp.fc2.to(HALF)


def wider(model):
    model.block.mlp.fc2 = nn.Linear(48, 64)


@pytest.mark.parametrize(('change', 'reason'), [
    (hooked, 'hook'), (hooked_drop_path, 'hook'), (adapted, 'hook'), (subclassed, 'another class'),
    (without_bias, 'lacks weight or bias'), (dilated, 'depthwise'), (other_eps, 'differ in eps'),
    (wider, 'do not fit'), (half_factor, 'in float32 are for')],
    ids=lambda value: getattr(value, '__name__', ''))
def test_what_keeps_a_block_from_it(place, calls, change, reason):
    model, x = make(place), torch.randn(2, 3, 5, 32, device=place)
    assert model.why_not(x) is None
    model(x)
    assert calls == [1]
    change(model)
    model.to(place)
    assert reason in model.why_not(x)
    if change in (wider, half_factor):  # then the steps say what is wrong
        with pytest.raises((RuntimeError, ValueError)):
            model(x)
    else:
        model(x)
    assert calls == [1]


def test_parameters_elsewhere(place):
    """Kernels never get addresses of another device."""
    model, x = make(place), torch.randn(2, 3, 5, 32, device=place)
    model.block.mlp.dwconv.to('meta')
    assert 'different devices' in model.why_not(x)


@pytest.mark.parametrize(('shape', 'heads', 'dtype', 'reason'), [
    ((1, 65, 2, 32), 2, SINGLE, 'more than 64 pixels'), ((1, 3, 2, 48), 2, SINGLE, 'P is 24'),
    ((1, 3, 2, 32), 2, torch.float64, 'float64'), ((0, 3, 2, 32), 2, SINGLE, 'batch is empty')],
    ids=str)
def test_inputs_that_go_step_by_step(place, calls, shape, heads, dtype, reason):
    model = make(place, heads=heads, head_dim=shape[3] // heads).to(dtype)
    x = torch.randn(shape, dtype=dtype, device=place)
    assert reason in model.why_not(x)
    assert model(x).shape == shape and not calls


@pytest.mark.parametrize('arch', ['small', 'base', 'large'])
def test_all_blocks_of_published_models_take_it_at_224(place, arch):
    arch = {**DEFAULTS, **ARCHS[arch]}
    for i, (dim, heads, form) in enumerate(zip(arch['embed_dims'], arch['num_heads'],
                                               arch['forms'], strict=True)):
        block = rmt.RMTBlock(dim, heads, form, mlp_ratio=arch['mlp_ratios'][i], drop_path=0.1,
                             layer_scale=arch['layer_scales'][i], with_cp=False).to(place)
        x = torch.zeros(1, 56 >> i, 56 >> i, dim, device=place)
        places = rmt.place(x, rmt.make_decay(heads).to(place), dim // heads, form)
        assert places.masks is None
        with torch.autocast(place, HALF):
            for map_ in (x, x.half()):
                assert block.why_not_one_op(map_, places) is None


def test_not_on_a_gpu():
    model, x = make('cpu'), torch.randn(1, 3, 4, 32)
    assert model.why_not(x) == 'the input is not on a GPU'
    assert torch.fx.symbolic_trace(model.block.mlp)(x).shape == x.shape


# --- in a loop on a GPU ---------------------------------------------------------------------------

@needs_gpu
@pytest.mark.parametrize('options', [{}, dict(layer_scale=0.5, drop_path=0.4)], ids=str)
@pytest.mark.parametrize('backward', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('form', ['decomposed', 'whole'])
def test_in_a_loop(monkeypatch, replays, form, backward, options):  # noqa: F811
    """To the bit the same by replayed graphs, with other numbers in the same memory each time."""
    results = []
    for worth_it in (graphs.WORTH_IT, 10**9):
        monkeypatch.setattr(graphs, 'WORTH_IT', worth_it)
        model, found = make('cuda', form, 4, 16, **options).train(backward), []
        x = torch.zeros(3, 7, 9, 64, device='cuda', requires_grad=backward)
        for seed in range(8):
            torch.manual_seed(seed)
            with torch.no_grad():
                x.normal_()
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
            for size in (2**20, 2**24):  # what lies in that memory is NaN
                torch.empty(size, device='cuda').fill_(torch.nan)
            with torch.autocast('cuda', HALF), torch.set_grad_enabled(backward):
                y = model(x)
            made = [y.detach()]
            if backward:
                made += torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
            found.append([t.cpu() for t in made])
            del y, made
        results.append(found)
        count = len(replays)
    assert count == len(replays) >= (4 if backward else 2)
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)
