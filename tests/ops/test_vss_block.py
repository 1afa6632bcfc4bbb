"""Blocks of VMamba, and stages of them, as one op beside the same step by step, on a GPU or on the
kernels emulated on the CPU; and what keeps a block from it."""

import copy

import pytest
import torch
from test_channels import BRAIN, HALF, LIMITS, SINGLE, randn, skip_types
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import vmamba_mm.layers.vss_block as layers
from vmamba_mm.layers import (
    ConvDownsample,
    ConvStem,
    MergeDownsample,
    PatchExpand,
    PatchStem,
    VSSBlock,
    VSSStage,
)
from vmamba_mm.ops.fused import channels
from vmamba_mm.ops.vss_block import Weights, reference
from vmamba_mm.testing import relative_error

BLOCKS = pytest.mark.parametrize('shape, ratio, feeds', [
    ((2, 7, 7, 32), 1.0, False), ((2, 9, 20, 40), 2.0, True), ((3, 1, 1, 32), 1.0, False)], ids=str)


@pytest.fixture
def calls(kernels, monkeypatch):
    """A list to which a call of the op appends 1."""
    calls, op = [], layers.vss_block
    monkeypatch.setattr(layers, 'vss_block', lambda *args: calls.append(1) or op(*args))
    return calls


def autocast(device, dtype):
    """None for fp32."""
    return torch.autocast(device, HALF if dtype == SINGLE else dtype, enabled=dtype != SINGLE)


def make_block(device, dim, ratio, feeds=False, drop_path=0.0, mlp_ratio=4.0, **ssm_cfg):
    torch.manual_seed(0)
    block = VSSBlock(dim, mlp_ratio=mlp_ratio, drop_path=drop_path, with_cp=False,
                     feeds_matmul=feeds,
                     ssm_cfg=dict(ssm_ratio=ratio, conv_bias=True, **ssm_cfg)).to(device)
    for name, parameter in block.named_parameters():
        if 'norm' in name or 'A_logs' in name:
            parameter.data.normal_(mean=0.5)
    return block


@pytest.mark.parametrize('dtype', [HALF, BRAIN, SINGLE], ids=['fp16', 'bf16', 'fp32'])
@BLOCKS
def test_block_in_one_op(request, kernels, calls, shape, ratio, feeds, dtype):
    """As step by step, which a hook brings back."""
    skip_types(request, dtype)
    block = make_block(kernels, shape[3], ratio, feeds).eval()
    x = randn(*shape, device=kernels)
    exact = copy.deepcopy(block).double()(x.double()).detach()
    assert not calls
    with torch.no_grad(), autocast(kernels, dtype):
        found = block(x)
        for name in ('ssm', 'ssm.out_proj', 'mlp', 'mlp.fc1', 'norm2'):
            handle = block.get_submodule(name).register_forward_hook(
                lambda *args: calls.append(2))
            step_by_step = block(x)
            handle.remove()
    assert calls == [1, *[2] * 5]
    assert found.dtype == step_by_step.dtype == (dtype if feeds else SINGLE)
    limit = max(2 * relative_error(step_by_step, exact), LIMITS[dtype])
    assert relative_error(found, exact) <= limit
    with torch.no_grad():
        pure = copy.deepcopy(block).to(dtype)(x.to(dtype))
    assert pure.dtype == dtype and relative_error(pure, exact) <= 2 * limit


@pytest.fixture
def chains(kernels, monkeypatch):
    """A list to which a call of the op of several blocks appends their number."""
    chains, op = [], layers.vss_blocks
    monkeypatch.setattr(layers, 'vss_blocks',
                        lambda x, own, *args: chains.append(len(own)) or op(x, own, *args))
    return chains


def make_stage(device, dim=36, ratio=1.0, feeds=False, depth=3, drop_path=0.0):
    return VSSStage([make_block(device, dim, ratio, feeds and i == depth - 1, drop_path)
                     for i in range(depth)], None)


@pytest.mark.parametrize('dtype', [HALF, BRAIN, SINGLE], ids=['fp16', 'bf16', 'fp32'])
@BLOCKS
def test_blocks_in_one_op(request, kernels, chains, shape, ratio, feeds, dtype):
    """To the bit what they are one by one, for their sums are kept in fp32."""
    skip_types(request, dtype)
    stage, x = make_stage(kernels, shape[3], ratio, feeds).eval(), randn(*shape, device=kernels)
    for parameter in stage.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)  # no block is another
    with torch.no_grad(), autocast(kernels, dtype):
        found, expected = stage(x), stage.blocks(x)
        assert chains == [3]
        assert found.dtype == expected.dtype == (dtype if feeds else SINGLE)
        assert torch.equal(found, expected)
    with torch.no_grad():
        exact = copy.deepcopy(stage).double().blocks(x.double())
        stage.to(dtype)
        found, expected = stage(x.to(dtype)), stage.blocks(x.to(dtype))
    assert chains == [3, 3] and found.dtype == dtype
    limit = max(2 * relative_error(expected, exact), LIMITS[dtype])
    assert relative_error(found, exact) <= limit


def test_blocks_that_do_not_run_as_one_op(kernels, chains):
    x = randn(2, 5, 6, 36, device=kernels)

    def runs(stage, x=x):
        chains.clear()
        with torch.no_grad():
            assert torch.equal(stage(x), stage.blocks(x))
            assert bool(chains) == (stage.why_not_one_op(x) is None)
        return bool(chains)

    stage = make_stage(kernels).eval()
    assert runs(stage)
    for module in (stage.blocks, stage.blocks[1], stage.blocks[2].mlp, stage.blocks[0].ssm.conv2d,
                   stage.blocks[1].drop_path):
        handle = module.register_forward_hook(lambda *args: None)
        assert not runs(stage)
        handle.remove()
    assert runs(stage)
    chains.clear()
    stage(x).sum().backward()
    assert not chains and stage.blocks[1].norm1.weight.grad is not None
    assert stage.why_not_one_op(x) == 'gradients are wanted'
    assert stage.blocks[1].why_not_one_op(x) is None
    stage.blocks[1].norm1.eps = 1e-3
    assert not runs(stage) and stage.blocks[1].why_not_one_op(x) == 'its norms differ in eps'
    dropping = make_stage(kernels, drop_path=0.5).train()
    with torch.no_grad():
        dropping(x)
    assert not chains
    assert runs(dropping.eval())


@pytest.mark.parametrize(('name', 'change'), [
    ('ssm.in_proj', lambda old: nn.Linear(old.in_features, old.out_features)),
    ('ssm.out_proj', lambda old: nn.Linear(old.in_features, old.out_features)),
    ('mlp.fc1', lambda old: nn.Linear(old.in_features, old.out_features, bias=False)),
    ('mlp.fc2', lambda old: nn.Linear(old.in_features, old.out_features, bias=False)),
    ('norm2', lambda old: nn.LayerNorm(old.normalized_shape, eps=0.5)),
    ('ssm.out_norm', lambda old: nn.LayerNorm(old.normalized_shape, elementwise_affine=False))],
    ids=['in_proj', 'out_proj', 'fc1', 'fc2', 'norm2', 'out_norm'])
def test_a_block_with_another_module_of_the_same_kind(kernels, calls, name, change):
    """A bias more or less and another eps are not read past."""
    block, x = make_block(kernels, 36, 1.0, False, 0.0).eval(), randn(2, 5, 6, 36, device=kernels)
    before = block(x)
    assert calls
    calls.clear()
    block.set_submodule(name, change(block.get_submodule(name)).to(kernels))
    found = block(x)
    assert not calls and not torch.allclose(found, before, atol=1e-3)
    exact = copy.deepcopy(block).double()(x.double())  # which no kernel takes
    assert relative_error(found, exact) <= 1e-4
    block.norm1.eps, block.norm2.eps = 0.1, 0.1
    assert relative_error(block(x), copy.deepcopy(block).double()(x.double())) <= 1e-4
    assert not calls


@pytest.mark.parametrize('name', ['norm1', 'norm2', 'ssm.out_norm'])
def test_a_norm_with_another_eps(kernels, calls, name):
    block, x = make_block(kernels, 36, 1.0, False, 0.0).eval(), randn(2, 5, 6, 36, device=kernels)
    block.get_submodule(name).eps = 0.5
    assert relative_error(block(x), copy.deepcopy(block).double()(x.double())) <= 1e-4
    assert not calls


def test_a_block_with_another_convolution(kernels, calls):
    block = make_block(kernels, 32, 1.0)
    x = randn(2, 5, 6, 32, device=kernels)
    for options in (dict(kernel_size=5, padding=2), dict(kernel_size=3, padding=2, dilation=2)):
        block.ssm.conv2d = nn.Conv2d(32, 32, groups=32, **options).to(kernels)
        with torch.no_grad():
            exact = copy.deepcopy(block).double()(x.double())
            with torch.autocast(kernels, HALF):
                assert relative_error(block(x), exact) <= 2e-3
    assert not calls


@pytest.mark.parametrize('options', [dict(act='gelu'), dict(act='relu'), dict(conv_kernel=5),
                                     dict(conv_kernel=0), dict(conv_kernel=0, gate=True)],
                         ids=str)
def test_a_block_of_an_ablation(kernels, calls, monkeypatch, options):
    """Neither the op of a block nor that of convolution and SiLU is taken where it is another."""
    monkeypatch.setattr('vmamba_mm.layers.ss2d.dwconv_silu', lambda *args: calls.append(2))
    block = make_block(kernels, 32, 1.0, **options).train()
    x = randn(2, 5, 6, 32, device=kernels).requires_grad_()

    def run(block, x):
        y = block(x)
        return y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])

    exact = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    with torch.autocast(kernels, HALF):
        for one, right in zip(run(block, x), exact, strict=True):
            assert relative_error(one, right) <= 2e-2
    assert not calls


VANILLA = dict(gate=True, d_state=16, mlp_ratio=0.0)


@pytest.mark.parametrize('dtype', [HALF, BRAIN, SINGLE], ids=['fp16', 'bf16', 'fp32'])
@pytest.mark.parametrize('shape', [(2, 7, 9, 36), (3, 1, 1, 32)], ids=str)
def test_vanilla_block_in_one_op(request, kernels, calls, shape, dtype):
    """As step by step, with a gate, 16 states and no MLP: result and every gradient."""
    skip_types(request, dtype)
    block = make_block(kernels, shape[3], 2.0, drop_path=0.3, **VANILLA).train()
    x, grad = (randn(*shape, device=kernels, seed=i) for i in (0, 1))
    x.requires_grad_()

    def run(block, x, dtype=SINGLE):
        torch.manual_seed(1)
        with autocast(kernels, dtype):
            y = block(x)
        return y, *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))

    exact = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    found = run(block, x, dtype)
    assert calls == [1] and block.why_not_one_op(x) is None
    block.ssm.out_norm.register_forward_hook(lambda *args: None)
    names = ['y', 'x', *(name for name, _ in block.named_parameters())]
    for name, one, other, right in zip(names, found, run(block, x, dtype), exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        limit = max(2 * relative_error(other, right), LIMITS[dtype])
        assert relative_error(one, right) <= limit, name
    assert calls == [1]


def test_vanilla_blocks_in_one_op(kernels, chains):
    """To the bit what they are one by one."""
    stage = VSSStage([make_block(kernels, 24, 2.0, **VANILLA) for _ in range(3)], None).eval()
    for parameter in stage.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)  # no block is another
    x = randn(2, 5, 6, 24, device=kernels)
    for dtype in (HALF, SINGLE):
        with torch.no_grad(), autocast(kernels, dtype):
            assert torch.equal(stage(x), stage.blocks(x))
    assert chains == [3, 3]


def test_a_block_of_more_states_is_not_one_op(kernels, calls):
    block = make_block(kernels, 16, 1.0, gate=True, d_state=17)
    x = randn(2, 5, 6, 16, device=kernels)
    assert block.why_not_one_op(x) == 'a state of 17: it takes up to 16'
    with torch.no_grad():
        assert relative_error(block(x), copy.deepcopy(block).double()(x.double())) <= 1e-4
    assert not calls


@pytest.mark.parametrize('dtype', [HALF, SINGLE], ids=['fp16', 'fp32'])
@BLOCKS
def test_gradients_of_a_block_in_one_op(kernels, calls, shape, ratio, feeds, dtype):
    block = make_block(kernels, shape[3], ratio, feeds, drop_path=0.3).train()
    x = randn(*shape, device=kernels).requires_grad_()
    grad = randn(*shape, device=kernels, seed=1)

    def run(block, x, dtype=SINGLE):
        torch.manual_seed(1)
        with autocast(kernels, dtype):
            y = block(x)
        return y, *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))

    exact = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    found = run(block, x, dtype)
    assert calls == [1]
    block.ssm.in_proj.register_forward_hook(lambda *args: None)
    names = ['y', 'x', *(name for name, _ in block.named_parameters())]
    for name, one, other, right in zip(names, found, run(block, x, dtype), exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        limit = max(2 * relative_error(other, right), LIMITS[dtype])
        assert relative_error(one, right) <= limit, name
    assert calls == [1]


@pytest.mark.parametrize('gate', [False, True], ids=['one op', 'vanilla'])
def test_block_recomputed(kernels, calls, gate):
    torch.manual_seed(0)
    block = VSSBlock(32, mlp_ratio=2.0, drop_path=0.5, with_cp=False,
                     ssm_cfg=dict(gate=gate, d_state=4 if gate else 1)).to(kernels)
    x = randn(3, 5, 6, 32, device=kernels).requires_grad_()
    results = []
    for block.with_cp in (False, True):
        torch.manual_seed(1)
        with torch.autocast(kernels, HALF):
            y = block(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(calls) == 3  # one of them again, in the backward


@pytest.mark.parametrize('scan', ['unidirectional', 'bidirectional', 'cascade'])
def test_block_of_another_scan_is_not_one_op(kernels, calls, scan):
    """Step by step, as in fp64 by plain PyTorch."""
    block = make_block(kernels, 32, 1.0, scan=scan).eval()
    x = randn(2, 5, 6, 32, device=kernels)
    with torch.no_grad(), torch.autocast(kernels, HALF):
        y = block(x)
    assert not calls
    assert relative_error(y, block.double()(x.double())) <= 0.02


def make_small_model(device, vanilla):
    """And the names of its ops. The vanilla one ends like VM-UNet, with an expanding."""
    if vanilla:
        return nn.Sequential(PatchStem(3, 16), make_block(device, 16, 2.0, **VANILLA),
                             MergeDownsample(16, odd='crop'), PatchExpand(32)).to(device), (
            'conv_norm', 'vss_block_fwd', 'merge_norm', 'expand_norm')
    return nn.Sequential(ConvStem(3, 32), make_block(device, 32, 1.0, feeds=True),
                         ConvDownsample(32)).to(device), (
        'conv_norm', 'conv_norm', 'vss_block_fwd', 'conv_norm')


@pytest.mark.parametrize('vanilla', [False, True], ids=['VMamba', 'vanilla'])
def test_compiled_stem_block_and_downsampling(kernels, vanilla):
    """As an op each, in one graph for all sizes."""
    model, names = make_small_model(kernels, vanilla)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 20, 24), (3, 3, 26, 16), (2, 3, 32, 36)):
        x = randn(*shape, device=kernels)
        results = []
        for run in (model, compiled):
            with torch.autocast(kernels, HALF):
                y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ops = [node.target.name() for graph in counter.graphs for node in graph.graph.nodes
           if 'vmamba_mm' in str(node.target)]
    assert ops == [f'vmamba_mm::{name}' for name in names]


def test_parameters_elsewhere(kernels):
    """Kernels never get addresses of another device."""
    block, x = make_block(kernels, 16, 2.0), randn(2, 5, 6, 16, device=kernels)
    elsewhere = torch.empty(16, device='meta')
    assert channels.why_not_channels(x, 16, (elsewhere,)) == 'the inputs are on different devices'
    assert 'another device' in block.to('meta').why_not_one_op(x)


def test_traced_vanilla_stage(kernels):
    """The recorded op of all blocks takes other sizes, with and without their gradients."""
    stage = VSSStage([make_block(kernels, 16, 2.0, **VANILLA) for _ in range(2)],
                     MergeDownsample(16)).eval().to(kernels)
    maps = [randn(*shape, 16, device=kernels) for shape in ((1, 4, 5), (2, 6, 3))]
    for wants_grad in (True, False):
        traced = torch.jit.trace(stage.requires_grad_(wants_grad), maps[0])
        for x in maps:
            torch.testing.assert_close(traced(x), stage(x), rtol=1e-5, atol=1e-5)
    assert 'vmamba_mm::vss_block(' in str(traced.inlined_graph)


def test_reference_of_a_block(kernels, monkeypatch):
    """With other factors of the branches for each sample."""
    block, x = make_block(kernels, 36, 2.0), randn(2, 5, 6, 36, device=kernels)
    taken = []
    monkeypatch.setattr(layers, 'vss_block', lambda x, weights, *args: taken.append(weights))
    block(x)
    scales = (torch.tensor([0.5, 2.], device=kernels), torch.tensor([3., 0.], device=kernels))
    for dtype, limit in ((SINGLE, 1e-5), (torch.float64, 1e-12)):
        weights = [t.to(dtype) for t in taken[0]]
        y = reference.vss_block(x.to(dtype), Weights._make(weights), *scales, block.norm1.eps,
                                dtype, dtype)
        exact = copy.deepcopy(block).double()
        branch = exact.ssm(exact.norm1(x.double())) * scales[0].view(-1, 1, 1, 1)
        total = x.double() + branch
        exact_y = total + exact.mlp(exact.norm2(total)) * scales[1].view(-1, 1, 1, 1)
        assert y.dtype == dtype and relative_error(y, exact_y) <= limit


# --- all ----------------------------------------------------------------------------------------

def test_opcheck_of_a_block_without_bias_of_its_convolution(kernels, monkeypatch):
    block = make_block(kernels, 32, 1.0)
    x = randn(2, 5, 6, 32, device=kernels)
    taken = []
    monkeypatch.setattr(layers, 'vss_block', lambda x, weights, *args: taken.append(weights))
    block(x)
    weights, settings = taken[0]._replace(conv_bias=None), (1e-5, HALF, SINGLE)
    opcheck(torch.ops.vmamba_mm.vss_block_fwd.default,
            (x.detach().requires_grad_(), *weights, torch.ones(2, device=kernels), None,
             *settings),
            test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))
    opcheck(torch.ops.vmamba_mm.vss_block.default,
            (x.detach(), [t.detach() for t in weights[:-1]], True, False, *settings))
