"""What runs as one op keeps PyTorch's contract: hooks, wrappers, transforms and substitutes work
as with a model of plain modules, with the same outputs and gradients."""

import copy
import functools
import re

import pytest
import torch
import torch.distributed as dist
from specs import SPECS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from vmamba_mm.layers import SS2D, LayerNorm, VSSBlock, VSSStage
from vmamba_mm.models import VMamba
from vmamba_mm.testing import DEVICES, relative_error

S1 = dict(embed_dims=8, depths=(1, 2, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv', scan='cross')
VANILLA = dict(S1, d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0,
               stem='patch', downsample='merge')
SSD = dict(S1, d_state=3, gate=True, core='ssd', act='silu')
ARCHS = {'s1': S1, 'vanilla': VANILLA, 'ssd': SSD}
#: The first architecture of every other family's spec.
OTHERS = {name: spec for name, spec in SPECS.items() if spec.model is not VMamba}
ZERO_GRADS = re.compile('|'.join(spec.zero_grads for spec in SPECS.values()))

on_both = pytest.mark.parametrize('device', DEVICES)
all_archs = pytest.mark.parametrize('arch', ['s1', 'vanilla'])
all_families = pytest.mark.parametrize('arch', [*ARCHS, *OTHERS])


def make(device, arch='s1', **kwargs):
    torch.manual_seed(0)
    nudge = OTHERS[arch].nudge if arch in OTHERS else 0.1
    if arch in OTHERS:
        model = OTHERS[arch].model(OTHERS[arch].first, **kwargs)
    else:
        model = VMamba(ARCHS[arch], **kwargs)
    for parameter in model.parameters():  # no norm is the identity, no gradient nearly 0
        parameter.data += nudge * torch.rand_like(parameter)
    return model.to(device).eval(), make_input(arch, 2, 3, 20, 12, device)


def make_input(arch, *size):
    """Images, or clips where the family takes them: size is (B, C, H, W, device)."""
    spec = OTHERS.get(arch, SPECS['vmamba'])
    return spec.input(spec.first, *size)


def step(model, x):
    """Outputs, and gradients by the input and the parameters, by name."""
    x = x.detach().clone().requires_grad_()
    outs = model(x)
    sum(y.square().mean() for y in outs).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return outs, dict(grads, x=x.grad)


def assert_same(found, expected, device, tolerance=1e-5):
    """On a GPU kernels and cuDNN are compared with the ops that they stand for, in TF32."""
    limit = 5e-3 if device == 'cuda' else tolerance
    for y, other in zip(found[0], expected[0], strict=True):
        assert relative_error(y, other) <= limit
    largest = max((grad.abs().max() for grad in expected[1].values()), default=0)
    for name, grad in expected[1].items():
        # Of the queries of a single token, say, there is nothing but rounding.
        least = (1e-5 if ZERO_GRADS.fullmatch(name) else 1e-8) * largest
        error = (found[1][name] - grad).abs().max() / max(grad.abs().max(), least)
        assert error <= 4 * limit, name


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def process_group(request):
    device = request.getfixturevalue('device')
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', store=dist.HashStore(),
                            rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- hooks ----------------------------------------------------------------------------------

def hookable(model):
    """Names of all modules but lists, which are never called."""
    return {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)}


@on_both
@all_families
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no-grad'])
def test_a_hook_on_every_module_fires(device, arch, grad):
    model, x = make(device, arch)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        for name in hookable(model):
            module, fired = model.get_submodule(name), []
            handles = [
                module.register_forward_pre_hook(lambda *args, fired=fired: fired.append('before')),
                module.register_forward_hook(lambda *args, fired=fired: fired.append('after'))]
            outs = model(x)
            for handle in handles:
                handle.remove()
            # Two branches of a block may share the module that drops them.
            often = OTHERS[arch].called_often if arch in OTHERS else '(?!)'
            several = name.endswith('drop_path') or re.search(often, name)
            times = len(fired) // 2 if several else 1
            assert fired == ['before', 'after'] * times and times, name
            for y, other in zip(outs, expected, strict=True):
                assert relative_error(y, other) <= (5e-3 if device == 'cuda' else 1e-5), name


@on_both
@all_families
def test_backward_hooks_fire(device, arch):
    model, x = make(device, arch)
    fired, names = set(), hookable(model) - {''}
    for name in names:
        model.get_submodule(name).register_full_backward_hook(
            lambda module, *grads, name=name: fired.add(name))
    step(model, x)
    assert fired == names


@on_both
def test_a_hook_can_change_what_comes_after(device):
    model, x = make(device)
    expected = model(x)
    for name in ('stages.1', 'stages.1.blocks.0.ssm.out_norm', 'stages.0.blocks.0.drop_path',
                 'norm2'):
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, args, y: tuple(2 * t for t in y) if isinstance(y, tuple) else 2 * y)
        assert not torch.allclose(model(x)[2], expected[2]), name
        handle.remove()
    assert torch.equal(model(x)[2], expected[2])


@on_both
@all_families
def test_global_hooks_see_every_module(device, arch):
    """As profilers set them."""
    model, x = make(device, arch)
    with torch.no_grad():
        expected, seen = model(x), []
        handle = register_module_forward_hook(lambda module, *args: seen.append(module))
        try:
            outs = model(x)
        finally:
            handle.remove()
    assert set(seen) == {model.get_submodule(name) for name in hookable(model)}
    assert_same((outs, {}), (expected, {}), device)


@on_both
@all_families
def test_a_forward_set_on_an_instance_is_called(device, arch):
    """As offloading libraries do it."""
    model, x = make(device, arch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = model(x)
            for name in hookable(model) - {''}:
                module, called = model.get_submodule(name), []

                def forward(*args, original=module.forward, called=called, **kwargs):
                    called.append(1)
                    return original(*args, **kwargs)

                module.forward = forward
                outs = model(x)
                del module.forward
                assert called, name
            assert_same((outs, {}), (expected, {}), device)


@on_both
def test_a_stage_by_itself(device):
    model, x = make(device)
    x = model.patch_embed(x)
    y = model.stages[0](x)
    assert y.shape == (2, 3, 2, 16)
    assert torch.equal(y, model.stages[0].downsample(model.stages[0].blocks(x)))
    before = model.stages[0](x, downsample=False)
    assert torch.equal(before, model.stages[0].blocks(x))
    assert all(map(torch.equal, model.stages[0](x, with_map=True), (y, before)))


# --- other modules in the place of ours -------------------------------------------------------

@on_both
@all_archs
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no-grad'])
def test_substitutes(device, arch, grad):
    """nn.Identity wherever shapes allow it, and nn.LayerNorm of the same weights for any norm."""
    model, x = make(device, arch)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        for name in hookable(model) - {''}:
            module = model.get_submodule(name)
            if isinstance(module, LayerNorm):
                plain = nn.LayerNorm(module.normalized_shape, module.eps, device=device)
                plain.load_state_dict(module.state_dict())
                model.set_submodule(name, plain)
                assert_same((model(x), {}), (expected, {}), device)
                model.set_submodule(name, module)
            if name.startswith('stages.3') and not name.endswith('conv2d'):
                changes_width = getattr(module, 'in_features', 0) != getattr(module,
                                                                             'out_features', 0)
                if changes_width or isinstance(module, nn.ModuleList):
                    continue
                model.set_submodule(name, nn.Identity())
                outs = model(x)
                assert outs[3].shape == expected[3].shape and torch.equal(outs[2], expected[2])
                if not name.endswith('drop_path'):
                    assert not torch.allclose(outs[3], expected[3]), name
                model.set_submodule(name, module)
        model.norm1 = nn.Identity()
        assert model(x)[1].shape == expected[1].shape


class LoRA(nn.Module):
    """A low-rank adapter, as libraries of them put it in a Linear's place."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@on_both
@all_families
def test_adapters(device, arch):
    model, _ = make(device, arch)
    x = make_input(arch, 2, 3, 36, 12, device)  # queries need a last map of two pixels
    expected = model(x)
    model.requires_grad_(False)
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    for name in linears:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    assert not torch.allclose(model(x)[-1], expected[-1])
    sum(y.square().mean() for y in model(x)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == ('.down.' in name
                                                                   or '.up.' in name), name
    for name in linears:
        nn.init.zeros_(model.get_submodule(name).up.weight)
    assert_same((model(x), {}), (expected, {}), device)


@on_both
def test_parametrizations(device):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, x = make(device)
    expected = model(x)
    for name, weight in (('stages.1.blocks.0.ssm', 'Ds'), ('stages.1.blocks.1.norm2', 'weight'),
                         ('stages.1.blocks.1.mlp.fc1', 'weight')):
        module = model.get_submodule(name)
        nn.utils.parametrize.register_parametrization(module, weight, Twice())
        assert not torch.allclose(model(x)[1], expected[1]), name
        nn.utils.parametrize.remove_parametrizations(module, weight, leave_parametrized=False)
        assert_same((model(x), {}), (expected, {}), device)


# --- wrappers -------------------------------------------------------------------------------

UNITS = {'whole': (), 'by stage': (VSSStage,), 'by block': (VSSBlock,), 'by mixer': (SS2D,),
         'by norm': (LayerNorm,)}


def units_of(arch, units):
    """The classes of the modules to wrap."""
    if arch not in OTHERS or units == 'whole':
        return UNITS[units]
    spec = OTHERS[arch]
    model = spec.model(spec.first)
    stage = getattr(model, model.stages_name)[0]
    block = stage if model.is_flat else stage.blocks[0]
    return {'by stage': (type(stage),), 'by block': (type(block),),
            'by norm': (nn.LayerNorm, nn.RMSNorm),
            'by mixer': (type(model.get_submodule(spec.a_weight.rsplit('.', 2)[0])),)}[units]


def shard1(model, units, use_orig_params):
    policy = ModuleWrapPolicy(set(units)) if units else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=next(
        model.parameters()).device, use_orig_params=use_orig_params)


def shard2(model, units):
    mesh = init_device_mesh(next(model.parameters()).device.type, (1,))
    for module in model.modules():
        if isinstance(module, units):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@on_both
@all_families
@pytest.mark.parametrize('units', UNITS)
@pytest.mark.parametrize('kind', ['fsdp1', 'fsdp1 flat', 'fsdp2'])
@pytest.mark.filterwarnings('ignore')
def test_sharded(device, process_group, kind, units, arch):
    model, x = make(device, arch)
    expected, _ = step(copy.deepcopy(model), x)
    with torch.no_grad():
        flat = torch.cat([p.grad.flatten() for p in backward(copy.deepcopy(model), x)])
    model = (shard2(model, units_of(arch, units)) if kind == 'fsdp2'
             else shard1(model, units_of(arch, units), kind == 'fsdp1'))
    with torch.no_grad():
        assert_same((model(x), {}), (expected, {}), device)
    outs = model(x)
    assert_same((outs, {}), (expected, {}), device)
    sum(y.square().mean() for y in outs).backward()
    found = torch.cat([getattr(p.grad, 'full_tensor', lambda g=p.grad: g)().flatten()
                       for p in model.parameters()])
    # FSDP pads and orders its flat parameters in ways of its own: compare what no order changes.
    limit = 5e-3 if device == 'cuda' else 1e-5
    assert relative_error(found.double().norm(), flat.double().norm()) <= limit


def backward(model, x):
    with torch.enable_grad():
        sum(y.square().mean() for y in model(x)).backward()
    return model.parameters()


@on_both
@pytest.mark.parametrize('static', [False, True])
def test_ddp(device, process_group, static):
    model, x = make(device)
    expected = step(copy.deepcopy(model), x)
    ddp = DistributedDataParallel(model, static_graph=static)
    for _ in range(2):
        outs = ddp(x)
        sum(y.square().mean() for y in outs).backward()
    grads = {name: p.grad / 2 for name, p in model.named_parameters()}
    del expected[1]['x']
    assert_same((outs, grads), expected, device)


@on_both
@all_families
@pytest.mark.parametrize('units', ['by stage', 'by block', 'by mixer', 'by norm'])
def test_activation_checkpointing(device, arch, units):
    model, x = make(device, arch)
    expected = step(model, x)
    classes = units_of(arch, units)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, classes))
    outs, grads = step(model, x)
    grads = {name.replace('_checkpoint_wrapped_module.', ''): g for name, g in grads.items()}
    assert_same((outs, grads), expected, device)


@on_both
@all_families
def test_replicas_of_data_parallel(device, arch):
    """nn.DataParallel gives each GPU a copy whose parameters are attributes only."""
    model, x = make(device, arch)
    expected = step(copy.deepcopy(model), x)[0]
    modules = list(model.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[id(child)]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same((replicas[id(model)](x), {}), (expected, {}), device)


# --- transforms and tracers -----------------------------------------------------------------

def loss_of(model, parameters, x):
    return sum(y.square().mean() for y in torch.func.functional_call(model, parameters, (x,)))


@on_both
@all_families
def test_functional_call_and_grad(device, arch):
    model, x = make(device, arch)
    outs, grads = step(model, x)
    parameters = dict(model.named_parameters())
    loss = functools.partial(loss_of, model)
    found = torch.func.grad(loss)(parameters, x)
    _, vjp = torch.func.vjp(lambda x: loss(parameters, x), x)
    found = dict(found, x=vjp(torch.ones((), device=device))[0])
    assert_same((torch.func.functional_call(model, parameters, (x,)), found), (outs, grads), device)
    doubled = {name: 2 * p for name, p in parameters.items()}
    assert not torch.allclose(torch.func.functional_call(model, doubled, (x,))[-1], outs[-1])


@on_both
@all_families
@torch.backends.cudnn.flags(enabled=False)  # its batch norm knows no vmap
def test_vmap_and_gradients_of_each_sample(device, arch):
    model, x = make(device, arch)
    if device == 'cpu':  # by weights before many norms, gradients are differences of large numbers
        model, x = model.double(), x.double()
    expected = model(x)
    outs = torch.vmap(lambda x: model(x[None]))(x)
    assert_same(([y[:, 0] for y in outs], {}), (expected, {}), device)
    parameters = dict(model.named_parameters())
    grads = torch.vmap(torch.func.grad(functools.partial(loss_of, model)),
                       in_dims=(None, 0))(parameters, x[:, None])
    for i in range(len(x)):
        _, own = step(model, x[i:i + 1])
        del own['x']
        assert_same(([], {name: g[i] for name, g in grads.items()}), ([], own), device, 1e-4)
    # A vmap over models: parameters are batched, images are not.
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    outs = torch.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
    assert_same(([y[1] for y in outs], {}), (expected, {}), device)


@on_both
@all_families
@pytest.mark.filterwarnings('ignore')
def test_jacobians(device, arch):
    model, _ = make(device, arch)
    # Of two voxels instance norm leaves the sign, and of gradients the rounding.
    side = 32 if arch in OTHERS and OTHERS[arch].slices else 8
    x = make_input(arch, 1, 3, side, side, device)
    if device == 'cpu':  # of a map of one pixel, fp32 leaves the rounding of some derivatives
        model, x = model.double(), x.double()

    def first(x):
        return model(x)[-1].flatten()[:3]

    expected = torch.autograd.functional.jacobian(first, x)
    limit = 5e-3 if device == 'cuda' else 1e-5
    assert relative_error(torch.func.jacrev(first)(x), expected) <= limit
    assert relative_error(torch.autograd.functional.jacobian(first, x, vectorize=True),
                          expected) <= limit
    try:  # a model of PyTorch's own operations has it
        _, found = torch.func.jvp(first, (x,), (x,))
    except NotImplementedError as err:
        assert re.search('no forward-mode derivative.*reverse mode|'
                         'forward AD with .* does not support it', str(err))
    else:
        assert relative_error(found, (expected * x).flatten(1).sum(1)) <= limit


@on_both
@all_families
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no-grad'])
@pytest.mark.filterwarnings('ignore')
def test_jit_trace(device, arch, grad):
    """torch.jit.trace checks a trace by tracing again, without gradients."""
    model, x = make(device, arch)
    expected = step(model, x)
    for trains in (True, False):
        model.requires_grad_(trains)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, x)
        assert_same((traced(x), {}), (expected[0], {}), device)
        if trains:
            assert_same(step(traced, x), expected, device)


@on_both
@all_families
def test_fx(device, arch):
    model, x = make(device, arch, drop_path_rate=0.2)
    expected = step(model, x)
    traced = torch.fx.symbolic_trace(model)
    found = step(traced, x)
    assert_same(found, expected, device)
    larger = make_input(arch, 3, 3, 26, 20, device)
    assert_same((traced(larger), {}), (model(larger), {}), device)
    model.train()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert_same((torch.fx.symbolic_trace(model)(x), {}), (expected, {}), device)


@on_both
def test_a_module_compiled_in_place_runs_as_compiled(device):
    model, x = make(device)
    with torch.no_grad():
        expected = model(x)
        for name in ('stages.1', 'stages.1.blocks.0', 'stages.1.blocks.0.mlp', 'norm0',
                     'stages.0.blocks.0.ssm.out_norm'):
            graphs, module = [], model.get_submodule(name)
            torch._dynamo.reset()
            module.compile(backend=lambda graph, inputs, graphs=graphs: graphs.append(1) or graph)
            outs = model(x)
            module._compiled_call_impl = None
            assert graphs, name
            assert_same((outs, {}), (expected, {}), device)


@pytest.mark.gpu(count=2)
@all_families
def test_data_parallel_on_two_gpus(arch):
    model, x = make('cuda', arch)
    expected = step(copy.deepcopy(model), x)
    parallel = nn.DataParallel(model, device_ids=[0, 1])
    outs, grads = step(parallel, x)
    grads = {name.removeprefix('module.'): grad for name, grad in grads.items()}
    assert_same((outs, grads), expected, 'cuda')
    with torch.no_grad():
        assert_same((parallel(x), {}), (expected[0], {}), 'cuda')
