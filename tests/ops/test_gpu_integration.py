"""The ops and layers inside what a training uses: compile, checkpointing, autocast, CUDA graphs,
streams, threads, DDP, deterministic mode. What a CPU can do too runs on both."""

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vmamba_mm.layers import SS2D, VSSBlock
from vmamba_mm.ops import selective_scan, ss2d_scan, ss2d_scan_norm
from vmamba_mm.testing import (
    assert_close,
    relative_error,
    selective_scan_inputs,
    ss2d_scan_inputs,
    with_grads,
)

# Inductor compiles in this process: its pool of others can keep pytest from ending.
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')

needs_gpu = pytest.mark.gpu
needs_two = pytest.mark.gpu(count=2)
on_both = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
HALVES = [pytest.param(torch.float16, id='fp16'), pytest.param(torch.bfloat16, id='bf16')]
VANILLA = dict(d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True)
CONFIGS = [pytest.param({}, id='s1'), pytest.param(VANILLA, id='vanilla'),
           pytest.param(dict(scan='cascade'), id='cascade')]
DIM = 16


def make(device, config=None, size=(9, 11), batch=2, layer=SS2D):
    torch.manual_seed(0)
    config = config or {}
    if layer is VSSBlock:
        config = dict(mlp_ratio=2.0, drop_path=0.0, with_cp=False, ssm_cfg=config)
    module = layer(DIM, **config).to(device)
    return module, torch.randn(batch, *size, DIM, device=device)


def autocast(device):
    """What a training on that device would use: fp16 on a GPU, nothing on a CPU."""
    return torch.autocast('cuda', torch.float16) if device == 'cuda' else nullcontext()


def step(module, x, context=None):
    """[y, gradient by x, gradients by the parameters]; by default under ``autocast``."""
    device = x.device.type
    x = x.detach().requires_grad_()
    with autocast(device) if context is None else context:
        y = module(x)
    rng = torch.Generator(device).manual_seed(1)
    grad_y = torch.randn(y.shape, generator=rng, device=y.device).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *module.parameters()], grad_y)
    return [y.detach(), *grads]


def assert_same(found, expected, rtol=0.0):
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert_close(one, other, rtol, f'result {i}')


@on_both
@pytest.mark.parametrize('config', CONFIGS)
def test_compile_fullgraph(device, config):
    """One graph, whose gradients are the eager ones up to the rounding of fused neighbours."""
    module, x = make(device, config)
    torch._dynamo.reset()
    backend = 'inductor' if device == 'cuda' else 'aot_eager'
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_same(step(compiled, x), step(module, x), 2e-2 if device == 'cuda' else 1e-5)


@on_both
def test_compile_with_dynamic_sizes(device):
    module, _ = make(device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((9, 11), (6, 17), (12, 5)):
        x = torch.randn(2, *size, DIM, device=device)
        assert_same(step(compiled, x), step(module, x), 2e-3 if device == 'cuda' else 1e-5)


@on_both
@pytest.mark.parametrize('config', CONFIGS)
def test_gradient_checkpointing(device, config):
    module, x = make(device, config, layer=VSSBlock)
    expected = step(module, x)
    module.with_cp = True
    assert_same(step(module, x), expected)


@on_both
@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('pure', [False, True], ids=['autocast', 'pure'])
@pytest.mark.parametrize('config', CONFIGS)
def test_half_precision(device, dtype, pure, config):
    module, x = make(device, config)
    exact = step(module.double(), x.double(), nullcontext())
    module.float()
    if pure:
        module, x = module.to(dtype), x.to(dtype)
    found = step(module, x, nullcontext() if pure else torch.autocast(device, dtype))
    limit = 0.02 if dtype == torch.float16 else 0.1
    names = ['y', 'x', *(name for name, _ in module.named_parameters())]
    for name, one, tensor in zip(names, found, [None, x, *module.parameters()], strict=True):
        assert tensor is None or one.dtype == tensor.dtype, name
    for name, one, other in zip(names, found, exact, strict=True):
        assert relative_error(one, other) <= limit, name


@on_both
@pytest.mark.parametrize('state', [1, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_channels_first(device, state, dtype):
    """The same numbers and gradients; the gradient by x has its strides."""
    inputs = ss2d_scan_inputs(2, 12, 9, 11, state=state, device=device)
    inputs['x'] = inputs['x'].to(dtype)
    norm = dict(norm_weight=inputs['D'][:12].clone(), norm_bias=inputs['D'][12:24].clone())
    for op, more in ((ss2d_scan, {}), (ss2d_scan_norm, norm)):
        expected, expected_grads = with_grads(op, inputs | more)
        first = inputs | more | dict(x=inputs['x'].contiguous())
        assert first['x'].stride() != inputs['x'].stride()
        y, grads = with_grads(op, first)
        limit = 1e-6 if dtype == torch.float32 else 2e-3
        assert_close(y, expected, limit)
        assert grads['x'].stride() == first['x'].stride()
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name], limit, name)


SCANS = {'s1': (ss2d_scan_inputs, (3, 24, 14, 14), {}, ss2d_scan),
         'spans': (ss2d_scan_inputs, (1, 24, 40, 30), {}, ss2d_scan),
         'N = 16': (ss2d_scan_inputs, (2, 24, 9, 20), {'state': 16}, ss2d_scan),
         'selective_scan': (selective_scan_inputs, (2, 4, 8, 150, 4), {},
                            partial(selective_scan, delta_softplus=True))}


@on_both
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
@pytest.mark.parametrize('case', SCANS)
def test_deterministic_mode(device, case, dtype):
    """Bit-equal from run to run."""
    make_inputs, shape, kwargs, op = SCANS[case]
    inputs = make_inputs(*shape, device=device, **kwargs)
    first = next(iter(inputs))
    inputs[first] = inputs[first].to(dtype)
    assert torch.are_deterministic_algorithms_enabled()  # by tests/ops/conftest.py
    y, grads = with_grads(op, inputs)
    assert y.isfinite().all()
    for _ in range(3):
        again, grads_again = with_grads(op, inputs)
        assert torch.equal(y, again)
        for name, grad in grads.items():
            assert torch.equal(grad, grads_again[name]), name


@on_both
@pytest.mark.parametrize('config', CONFIGS)
def test_threads(device, config):
    """Forward and backward in new threads, several at once, as torch's DataParallel runs them."""
    module, x = make(device, config)
    inputs = [x + i for i in range(4)]
    expected = [step(module, t) for t in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, other in zip(pool.map(lambda t: step(module, t), inputs), expected,
                                strict=True):
            assert_same(found, other)


@on_both
def test_backward_in_another_thread(device):
    module, x = make(device)
    with autocast(device):
        y = module(x)
    thread = threading.Thread(target=lambda: y.float().square().sum().backward())
    thread.start()
    thread.join()
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    with autocast(device):
        y = module(x)
    y.float().square().sum().backward()
    assert_same(found, [p.grad for p in module.parameters()])


@needs_gpu
@pytest.mark.parametrize('config', CONFIGS)
def test_cuda_graph_of_forward_and_backward(config):
    module, x = make('cuda', config)
    static = torch.zeros_like(x)
    step(module, static)  # compilation, the libraries' workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_for_capture(module, static)
    for data in (x, 2 * x):
        static.copy_(data)
        graph.replay()
        assert_same(captured, step_for_capture(module, data))


def step_for_capture(module, x):
    x = x.detach().requires_grad_()
    with autocast('cuda'):
        y = module(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(),
                                             [x, *module.parameters()])]


@needs_gpu
@pytest.mark.parametrize('config', CONFIGS)
def test_other_streams(config):
    module, x = make('cuda', config)
    expected = step(module, x)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Work on the default stream that must not be waited for, nor mixed up with.
            torch.cuda._sleep(10_000_000)
            results.append(step(module, x))
    torch.cuda.synchronize()
    for found in results:
        assert_same(found, expected)


@needs_two
def test_a_device_that_is_not_the_current_one():
    module, x = make('cuda:0')
    expected = [t.cpu() for t in step(module, x)]
    module, x = copy.deepcopy(module).to('cuda:1'), x.to('cuda:1')
    assert torch.cuda.current_device() == 0
    x = x.requires_grad_()
    with autocast('cuda'):
        y = module(x)
    rng = torch.Generator('cuda:0').manual_seed(1)
    grad_y = torch.randn(y.shape, generator=rng, device='cuda:0').to(y)
    found = [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad_y)]
    assert_same([t.cpu() for t in found], expected)


# --- DDP ------------------------------------------------------------------------------------

def train(module, x, device):
    """Gradients of one step, by name."""
    with autocast(device):
        y = module(x)
    # Scaled, as a GradScaler does: without it the gradients are below fp16's normal numbers.
    (2**10 * y.float().square().mean()).backward()
    return {name.removeprefix('module.'): p.grad.cpu() for name, p in module.named_parameters()}


@on_both
def test_ddp_of_one_process(device):
    module, x = make(device, layer=VSSBlock)
    expected = train(copy.deepcopy(module), x, device)
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', store=dist.HashStore(),
                            rank=0, world_size=1)
    try:
        found = train(DistributedDataParallel(module), x, device)
    finally:
        dist.destroy_process_group()
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


def train_as_rank(rank, path):
    torch.cuda.set_device(rank)
    module, x = make('cuda', layer=VSSBlock, batch=4)
    dist.init_process_group('nccl', init_method=f'file://{path}/store', rank=rank, world_size=2)
    ddp = DistributedDataParallel(module, device_ids=[rank])
    torch.save(train(ddp, x[2 * rank:2 * rank + 2], 'cuda'), f'{path}/{rank}.pt')
    dist.destroy_process_group()


@needs_two
def test_ddp_of_two_gpus(tmp_path):
    module, x = make('cuda', layer=VSSBlock, batch=4)
    expected = train(module, x, 'cuda')
    torch.multiprocessing.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for name, grad in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], grad, 5e-3, name)
