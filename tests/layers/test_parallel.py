"""What makes torch's wrappers for several processes cost less: the same results as without it."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vmamba_mm.layers import VSSBlock
from vmamba_mm.layers.parallel import on_shards, shard, share_buckets
from vmamba_mm.layers.stage import Stage
from vmamba_mm.ops.core import grad_places
from vmamba_mm.ops.core.grad_places import Places, new_grad

on_both = pytest.mark.parametrize('device', [
    'cpu', pytest.param('cuda', marks=pytest.mark.gpu)])


@pytest.fixture
def process_group():
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
                            store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Product(torch.autograd.Function):
    """x @ w, whose backward asks for the place of its gradient as those of blocks do."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, torch.mm(x.T, grad, out=new_grad(w))


class Products(nn.Module):
    def __init__(self, times=1):
        super().__init__()
        self.times = times
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(5)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for _ in range(self.times):
            for w in self.weights:
                x = Product.apply(x, w).tanh()
        return self.head(x)


def make_ddp(module, **options):
    options = dict(gradient_as_bucket_view=True, **options)
    ddp = DistributedDataParallel(module, **options)
    share_buckets(ddp)
    return ddp


def count_places(monkeypatch):
    """A list of whether each place that was asked for was given out."""
    taken, take = [], grad_places._Place.take

    def counted(self, parameter):
        memory = take(self, parameter)
        taken.append(memory is not None)
        return memory

    monkeypatch.setattr(grad_places._Place, 'take', counted)
    return taken


# --- DistributedDataParallel ----------------------------------------------------------------------

@pytest.mark.parametrize('times', [1, 2])
def test_gradients_lie_in_the_buckets(process_group, monkeypatch, times):
    torch.manual_seed(0)
    module = Products(times)
    plain, taken = copy.deepcopy(module), count_places(monkeypatch)
    ddp = make_ddp(module)
    for i in range(4):
        x = torch.randn(3, 8)
        for model in (ddp, plain):
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()
        for p, expected in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad)
        if i == 3:
            # A parameter's second gradient has memory of its own: autograd adds the two.
            assert taken[-5 * times:] == [True] * 5 + [False] * 5 * (times - 1)
            storages = {p.grad.untyped_storage().data_ptr() for p in module.parameters()}
            assert len(storages) == 1


def test_gradients_that_are_there_are_added_to(process_group, monkeypatch):
    torch.manual_seed(0)
    module = Products()
    plain, taken = copy.deepcopy(module), count_places(monkeypatch)
    ddp = make_ddp(module)
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
        x = torch.randn(3, 8)
        with ddp.no_sync():
            ddp(x).sum().backward()
        kept = [p.grad.clone() for p in module.parameters()]
        first = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
        torch.testing.assert_close(kept, list(first))
        ddp(2 * x).sum().backward()
        (plain(x).sum() + plain(2 * x).sum()).backward()
        for p, expected in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad)
    assert taken[-10:] == [True] * 5 + [False] * 5


def test_only_views_of_the_same_form_are_places():
    w, places = nn.Parameter(torch.zeros(4, 8)), Places()
    memory = torch.zeros(100)

    def give(view):
        places.offer([w], [view])
        places.renew()
        with torch.no_grad():
            return new_grad(w).untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()

    assert give(memory[4:36].view(4, 8))
    assert not give(memory[1:33].view(4, 8))  # not aligned
    assert not give(memory[:32].view(8, 4))
    assert not give(memory[:32].view(8, 4).T)
    assert not give(memory[:16].view(torch.bfloat16).view(4, 8))
    assert give(memory[:32].view(4, 8))
    with torch.enable_grad():  # a backward of which there is a graph
        places.renew()
        assert new_grad(w).untyped_storage().data_ptr() != memory.data_ptr()


def test_places_end_with_their_owner():
    w, places = nn.Parameter(torch.zeros(8)), Places()
    places.offer([w], [torch.zeros(8)])
    assert id(w) in grad_places._places
    del places
    gc.collect()
    assert id(w) not in grad_places._places


def test_buckets_that_are_no_gradients(process_group):
    with pytest.raises(ValueError, match='gradient_as_bucket_view=True'):
        share_buckets(DistributedDataParallel(nn.Linear(4, 4)))


def exchange(rank, path):
    dist.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=2)
    torch.manual_seed(0)
    module = Products()
    whole, ddp = copy.deepcopy(module), make_ddp(module, bucket_cap_mb=0.0006)
    for i in range(4):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i))
        module.zero_grad(set_to_none=True)
        whole.zero_grad(set_to_none=True)
        ddp(x[rank]).square().mean().backward()
        whole(x.flatten(0, 1)).square().mean().backward()
        for p, expected in zip(module.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad)
    torch.save([p.grad for p in module.parameters()], f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_exchange_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(exchange, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_both
def test_blocks(process_group, monkeypatch, device):
    """On a GPU blocks write into the buckets; the parameters are the same to the bit."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[VSSBlock(16, mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg={})
                             for _ in range(3)]).to(device)
    plain, taken = copy.deepcopy(blocks), count_places(monkeypatch)
    ddp = make_ddp(blocks, bucket_cap_mb=0.02)
    models = [(model, torch.optim.AdamW(model.parameters(), 1e-3)) for model in (ddp, plain)]
    for _ in range(6):  # from the third on, the graphs of blocks are replayed
        x = torch.randn(2, 9, 11, 16, device=device)
        for model, optimizer in models:
            with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), expected in zip(blocks.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, expected), name
    if device == 'cuda':
        count = len(list(blocks.parameters()))
        assert taken[-count:] == [True] * count


# --- FSDP2 ----------------------------------------------------------------------------------------

class Net(nn.Module):
    """Blocks in lists of the name that all backbones have, of 72 parameters each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.stages = nn.ModuleList([self.make_stage(2), self.make_stage(3)])

    @staticmethod
    def make_stage(depth):
        stage = nn.Module()
        stage.blocks = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        return stage

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x).tanh()
        return x


class StagedNet(Net):
    @staticmethod
    def make_stage(depth):
        return Stage([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)], None)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


@pytest.mark.parametrize('kind, size, units', [
    (Net, 1, 5), (Net, 144, 3), (Net, 10**6, 1), (StagedNet, 1, 2)])
@pytest.mark.parametrize('reshard', [False, True])
def test_shard(process_group, kind, size, units, reshard):
    torch.manual_seed(0)
    net = kind()
    plain = copy.deepcopy(net)
    assert shard(net, init_device_mesh('cpu', (1,)), unit_size=size,
                 reshard_after_forward=reshard) is net
    states = {id(m._get_fsdp_state()) for m in net.modules() if isinstance(m, FSDPModule)}
    assert len(states) == units + 1  # and the rest
    train = [(model, cls(model.parameters(), lr=1e-2)) for model, cls in (
        (net, on_shards(torch.optim.AdamW)), (plain, torch.optim.AdamW))]
    for _ in range(4):
        x = torch.randn(3, 8)
        for model, optimizer in train:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
    for (name, p), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), expected, msg=name)


def train_sharded(rank, path):
    """The biases stay whole; one of three backwards exchanges nothing."""
    dist.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=2)
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    shard(net, init_device_mesh('cpu', (2,)), unit_size=144, whole_below=10)
    assert [hasattr(p, 'full_tensor') for p in net.parameters()] == [True, False] * 6
    optimizer = on_shards(torch.optim.AdamW)(net.parameters(), lr=1e-2, fused=True)
    expected = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        for syncs in (False, True, True):
            x = torch.randn(2, 3, 8, generator=generator)
            net.set_requires_gradient_sync(syncs)
            net(x[rank]).square().mean().backward()
            plain(x.flatten(0, 1)).square().mean().backward()
        for p, whole in zip(net.parameters(), plain.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p, 'full_tensor') else p.grad
            torch.testing.assert_close(grad, whole.grad)
        for optim in (optimizer, expected):
            optim.step()
            optim.zero_grad()
    found = [p.full_tensor() if hasattr(p, 'full_tensor') else p for p in net.parameters()]
    torch.testing.assert_close(found, list(plain.parameters()), rtol=1e-4, atol=1e-5)
    torch.save([p.detach() for p in found], f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_small_parameters_that_stay_whole(tmp_path):
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_groups_of_an_optimizer_on_shards(process_group):
    net = shard(Net(), init_device_mesh('cpu', (1,)))
    weights = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    before = [p.full_tensor().clone() for p in weights]
    optimizer = on_shards(torch.optim.SGD)([dict(params=weights, lr=0.0), dict(params=biases)],
                                           lr=1.0)
    assert [group['lr'] for group in optimizer.param_groups] == [0.0, 1.0]
    net(torch.randn(3, 8)).sum().backward()
    grads, old = [p.grad.full_tensor() for p in biases], [p.full_tensor().clone() for p in biases]
    optimizer.step()
    for p, expected in zip(weights, before, strict=True):
        assert torch.equal(p.full_tensor(), expected)
    for p, was, grad in zip(biases, old, grads, strict=True):
        torch.testing.assert_close(p.full_tensor(), was - grad)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.full_tensor().any() for p in net.parameters())


def test_a_model_without_blocks(process_group):
    with pytest.raises(ValueError, match='no list of modules with the name blocks'):
        shard(nn.Linear(4, 4))
    with pytest.raises(ValueError, match='no parameter to shard'):
        shard(Net(), init_device_mesh('cpu', (1,)), whole_below=1000)
