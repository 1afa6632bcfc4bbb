"""The backbone under torch.compile: one graph, and few of them for many sizes of images.

On a CPU; ``tests/ops/test_gpu_integration.py`` has the layers on a GPU.
"""

import os
import shutil
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config
from torch._dynamo.backends.debugging import aot_eager

from vmamba_mm.layers import ConvStem
from vmamba_mm.models import VMamba

# Inductor compiles in this process: its pool of others can keep pytest from ending.
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')

S1 = dict(embed_dims=8, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv', scan='cross')
VANILLA = dict(S1, d_state=2, conv_bias=True, gate=True, mlp_ratio=0.0, stem='patch',
               downsample='merge')
SSD = dict(S1, d_state=3, core='ssd')


class Counting:
    """A backend that counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, example_inputs):
        self.graphs += 1
        return aot_eager(graph_module, example_inputs)


@pytest.fixture
def counting():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


def outputs_and_grads(model, parameters, x, context):
    """The drawn paths are the same at each call."""
    torch.manual_seed(1)
    with context, torch.set_grad_enabled(model.training):
        outs = model(x)
    if not model.training:
        return outs
    return [*outs, *torch.autograd.grad(sum(out.float().square().mean() for out in outs),
                                        parameters)]


@pytest.mark.parametrize('arch, training, with_cp, autocast', [
    (S1, True, False, False), (S1, True, True, False), (S1, True, True, True),
    (S1, False, False, True), (VANILLA, True, True, True), (VANILLA, False, False, False),
    (SSD, True, False, False), (SSD, False, False, True)],
    ids=['training', 'with_cp', 'with_cp-autocast', 'eval-autocast', 'vanilla-with_cp-autocast',
         'vanilla-eval', 'ssd-training', 'ssd-eval-autocast'])
def test_one_graph(counting, arch, training, with_cp, autocast):
    torch.manual_seed(0)
    model = VMamba(arch, drop_path_rate=0.3, with_cp=with_cp).train(training)
    x, parameters = torch.randn(2, 3, 40, 72), list(model.parameters())
    results = []
    for called in (model, torch.compile(model, backend=counting, fullgraph=True)):
        context = torch.autocast('cpu', torch.bfloat16) if autocast else nullcontext()
        results.append(outputs_and_grads(called, parameters, x, context))
    assert counting.graphs == 1
    for found, expected in zip(*results, strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error < (2e-2 if autocast else 1e-5)


# Sides above 35: a last map of a single row or column is a graph of its own.
SIZES = [(64, 96), (80, 64), (64, 64), (97, 65), (100, 100), (36, 127), (128, 40), (130, 111),
         (65, 64), (72, 88)]


# Batch sizes one after the other, and the number of graphs after them.
SAME, OTHERS, ONE, ALL = ([2] * 10, 2), ([3, 4, 2, 5], 3), ([1, 1, 1], 4), ([2, 7, 1], 4)


# A graph of variable sizes takes 2 s for each stage: two of them have all that an architecture is
# made of, and its sizes after a downsampling.
@pytest.mark.parametrize('arch, stages, training, runs', [
    (S1, (0, 1, 2, 3), True, (SAME, OTHERS, ONE, ALL)), (VANILLA, (0, 1), False, (SAME,)),
    (SSD, (0, 1), False, (SAME,))], ids=['s1', 'vanilla', 'ssd'])
def test_many_sizes_are_few_graphs(counting, arch, stages, training, runs):
    """One graph for the first size and one for all others; one more for batches of other sizes,
    one for those of a single image."""
    model = VMamba(arch, stages, drop_path_rate=0.3,
                   compile=dict(backend=counting, fullgraph=True))
    model.train(training)
    for batches, graphs in runs:
        for batch, size in zip(batches, SIZES, strict=False):
            with torch.set_grad_enabled(training):
                outs = model(torch.randn(batch, 3, *size))
            assert len(outs) == len(stages) and outs[0].shape[0] == batch
            if training:
                sum(out.sum() for out in outs).backward()
        assert counting.graphs == graphs, batches


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None and not os.environ.get('CI'),
                    reason='needs a C++ compiler')
def test_inductor_with_both_sides_variable():
    """The option that the README gives: without it, torch 2.14 raises at the second size."""
    options = dict(strict_output_strides=True)
    if not hasattr(torch._inductor.config, 'strict_output_strides'):
        pytest.skip('this torch has no such option')
    torch._dynamo.reset()
    torch.manual_seed(0)
    stem = ConvStem(3, 8)
    compiled = torch.compile(stem, fullgraph=True, options=options)
    for size in ((64, 96), (80, 64), (97, 131)):
        x = torch.randn(2, 3, *size)
        results = [torch.autograd.grad(called(x).square().mean(), list(stem.parameters()))
                   for called in (compiled, stem)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
