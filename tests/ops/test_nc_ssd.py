"""What is special about the non-causal SSD of VSSD, and a VSSD on the kernels around it."""

import pytest
import torch
from emulated_cuda import NEEDS_COMPILER, emulated_gpu
from op_specs.nc_ssd import make, make_bare

from vmamba_mm.models import VSSD
from vmamba_mm.ops import nc_ssd, nc_ssd_norm
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.nc_ssd import cuda
from vmamba_mm.testing import assert_close

NAMES = 'x', 'dt', 'A', 'B', 'C', 'D'


def run(inputs, **options):
    return nc_ssd(*map(inputs.get, NAMES), dt_bias=inputs['dt_bias'], dt_softplus=True, **options)


def test_the_order_of_tokens_has_no_meaning():
    inputs = make(2, 31, 4, 3, 2, 5)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    moved = {k: t[:, order] if t.dim() > 2 else t for k, t in inputs.items()}
    assert_close(run(moved), run(inputs)[:, order], 1e-12)


def test_it_is_linear_attention_without_a_mask():
    """Heads 0 and 2 are of group 0, heads 1 and 3 of group 1."""
    inputs = make(2, 11, 4, 3, 2, 5)
    weights = -inputs['A'] * torch.nn.functional.softplus(inputs['dt'] + inputs['dt_bias'])
    y = run(inputs)
    for head, group in enumerate((0, 1, 0, 1)):
        scores = inputs['C'][:, :, group] @ inputs['B'][:, :, group].mT
        x = inputs['x'][:, :, head]
        expected = scores @ (weights[:, :, head, None] * x) + inputs['D'][head] * x
        assert_close(y[:, :, head], expected, 1e-12)


def test_sums_over_the_tokens_of_a_large_image_stay_within_fp16():
    """A state of 70,000 tokens is 140,000 here, and fp16 ends at 65,504."""
    length = 70_000
    ones = torch.ones(1, length, 1, 4, dtype=torch.float16)
    x = ones[..., :1].clone().requires_grad_()
    dt = torch.full((1, length, 1), 2.0, dtype=torch.float16)
    y = nc_ssd(x, dt, torch.tensor([-1.0]), ones, ones / 16384)
    assert_close(y, torch.full_like(y, 4 * 2 * length / 16384), 1e-3)
    grad, = torch.autograd.grad(y, x, torch.ones_like(y) / 16)
    assert_close(grad, torch.full_like(grad, 4 * 2 * length / 16384 / 16), 1e-3)


@pytest.mark.parametrize('inputs_of, groups, dtype, lengths', [
    (make, 2, torch.float64, (7, 12)), (make_bare, 1, torch.float16, (12,))], ids=['fp64', 'fp16'])
def test_compilers_get_ops_of_torch(inputs_of, groups, dtype, lengths):
    """Of any number of tokens, with the same results and gradients, whatever autocast says."""
    def function(x, dt, A, B, C, D=None, dt_bias=None):
        return nc_ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_bias is not None,
                      positive=dt_bias is not None)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend='aot_eager')
    limit = 1e-12 if dtype == torch.float64 else 10 * torch.finfo(dtype).eps
    for length in lengths:
        results = []
        for run_it in (function, compiled):
            inputs = {k: (t.to(dtype) if k in ('x', 'dt', 'B', 'C') else t.to(
                torch.promote_types(dtype, torch.float32))).requires_grad_()
                for k, t in inputs_of(2, length, 4, 3, groups, 5).items()}
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float64):
                y = run_it(**inputs)
            grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
            results.append([y.detach(), *grads])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            assert_close(one, other, limit)


def test_an_exported_model_needs_nothing_of_this_package():
    module = torch.nn.Module()
    module.forward = lambda x, dt, A, B, C, D, dt_bias: nc_ssd(
        x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)
    inputs = tuple(make(2, 7, 4, 3, 2, 5).values())
    exported = torch.export.export(module, inputs)
    assert not any('vmamba_mm' in str(node.target) for node in exported.graph.nodes)
    assert_close(exported.module()(*inputs), module(*inputs), 1e-12)


@NEEDS_COMPILER
@pytest.mark.parametrize('groups, spans', [(1, 1), (3, 1), (1, 3)])
def test_kernels_of_inputs_side_by_side(compiled, monkeypatch, spans, groups):
    """x, B and C in one tensor, as the layer has them, and sequences in spans."""
    monkeypatch.setattr(cuda, 'force_spans', spans)
    inputs = {k: t.float() for k, t in make(2, 300, 6, 24, groups, 40).items()}
    sizes, grad = [inputs[k][0, 0].numel() for k in 'xBC'], inputs['x'].cos()

    def run_it(backend, inputs):
        inputs = {k: t.requires_grad_() for k, t in inputs.items()}
        joined = torch.cat([inputs[k].flatten(2) for k in 'xBC'], dim=2).split(sizes, dim=2)
        parts = {k: t.unflatten(2, inputs[k].shape[2:])
                 for k, t in zip('xBC', joined, strict=True)}
        y = run(inputs | parts, backend=backend)
        return y, torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype))

    expected, expected_grads = run_it('reference', {k: t.double() for k, t in inputs.items()})
    with emulated_gpu(compiled):
        launch.forget()
        y, grads = run_it('cuda', inputs)
    assert_close(y, expected, 1e-5)
    for one, right in zip(grads, expected_grads, strict=True):
        assert_close(one, right, 1e-5)


@NEEDS_COMPILER
@pytest.mark.parametrize('groups, shared', [(1, 20_000), (2, 16_000)])
def test_more_channels_than_fit_into_shared_memory(compiled, monkeypatch, groups, shared):
    """Blocks have some of them, or with a norm, which needs all, one chunk of C at a time."""
    monkeypatch.setattr(cuda, 'force_shared', shared)
    inputs = {k: t.float() for k, t in make(8, 150, 6, 24, groups, 16).items()}
    norm = dict(z=torch.randn(8, 150, 144), norm_weight=torch.randn(144),
                norm_bias=torch.randn(144)) if groups == 1 else None

    def run_it(inputs, norm):
        y = run(inputs)
        if norm is None:
            return y, y
        return y, nc_ssd_norm(*map(inputs.get, NAMES), dt_bias=inputs['dt_bias'],
                              dt_softplus=True, **norm)

    expected = run_it({k: t.double() for k, t in inputs.items()},
                      norm and {k: t.double() for k, t in norm.items()})
    with emulated_gpu(compiled), torch.no_grad():
        launch.forget()
        found = run_it(inputs, norm)
        launch.forget()
    for one, right in zip(found, expected, strict=True):
        assert_close(one, right, 1e-5)


@NEEDS_COMPILER
def test_a_model_on_the_kernels(compiled):
    """Those of norms, sums, MLPs, the convolution and its state, with rows of the projection that
    have gaps: the results and gradients are those of plain PyTorch."""
    torch.manual_seed(0)
    model = VSSD(dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), d_state=8)).eval()
    x = torch.randn(2, 3, 40, 36)

    def run_model(dtype=torch.float32):
        model.zero_grad()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            maps = model(x)
        sum((y * y.detach().cos()).sum() for y in maps).backward()
        return maps, [p.grad.clone() for p in model.parameters()]

    expected, expected_grads = run_model()
    with emulated_gpu(compiled):
        found, grads = run_model()
        halves, _ = run_model(torch.bfloat16)
    for one, half, right in zip(found, halves, expected, strict=True):
        assert_close(one, right, 1e-5)
        assert_close(half, right, 3e-2)
    for one, right in zip(grads, expected_grads, strict=True):
        assert_close(one, right, 1e-3)
