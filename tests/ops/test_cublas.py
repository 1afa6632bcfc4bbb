"""Products by cuBLASLt against fp64, on an NVIDIA GPU."""

import threading
from types import SimpleNamespace

import pytest
import torch

from vmamba_mm.ops.core import gemm
from vmamba_mm.testing import relative_error

needs_gpu = pytest.mark.gpu(nvidia=True)


def make(rows, columns, inner, dtype, out_dtype, **kwargs):
    """Left, right, bias, where the result goes (NaN), and what calculates it."""
    product = gemm.product(0, dtype, out_dtype, rows, columns, inner, **kwargs)

    def matrix(height, width, transposed):
        shape = (width, height) if transposed else (height, width)
        return torch.randn(shape, device='cuda').to(dtype)

    left = matrix(rows, inner, kwargs.get('left_t'))
    right = matrix(inner, columns, kwargs.get('right_t'))
    bias = torch.randn(columns, device='cuda').to(dtype)
    out = torch.full((rows, columns), torch.nan, device='cuda', dtype=out_dtype)
    workspace = torch.full((product.workspace // 2,), torch.nan, device='cuda', dtype=dtype)

    def run():
        product.run(*[t.data_ptr() for t in (left, right, out, workspace)],
                    *[bias.data_ptr()] * bool(kwargs.get('bias')))

    expected = ((left.T if kwargs.get('left_t') else left).double()
                @ (right.T if kwargs.get('right_t') else right).double())
    return run, out, expected + bias if kwargs.get('bias') else expected


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('sizes', [(49, 768, 3072), (1, 4, 8), (3137, 36, 100), (96, 96, 25088)],
                         ids=str)
@pytest.mark.parametrize('kwargs, to_float', [
    *((kwargs, to_float) for kwargs in ({}, {'left_t': True}, {'right_t': True})
      for to_float in (False, True)),
    ({'right_t': True, 'bias': True}, False)], ids=str)
def test_products(dtype, sizes, kwargs, to_float):
    run, out, expected = make(*sizes, dtype, torch.float32 if to_float else dtype, **kwargs)
    run()
    limit = 1e-5 if to_float else torch.finfo(dtype).eps
    assert relative_error(out, expected) <= limit


@needs_gpu
@pytest.mark.parametrize('kwargs', [{}, {'left_t': True}, {'right_t': True, 'bias': True}], ids=str)
def test_products_in_fp32(kwargs):
    errors = []
    for tf32 in (False, True):
        run, out, expected = make(3137, 96, 388, torch.float32, torch.float32, tf32=tf32, **kwargs)
        run()
        errors.append(relative_error(out, expected))
    assert errors[0] <= 2e-6 and 1e-5 <= errors[1] <= 1e-3


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=['fp16', 'fp32'])
@pytest.mark.parametrize('kwargs', [{}, {'left_t': True}, {'right_t': True}], ids=str)
def test_batches_with_gaps_between_rows(kwargs, dtype):
    rows, columns, inner, batch, gap = 500, 35, 48, 2, 8
    shapes = [(inner, rows) if kwargs.get('left_t') else (rows, inner),
              (columns, inner) if kwargs.get('right_t') else (inner, columns), (rows, columns)]
    pitches = tuple(-(-width // 8) * 8 + gap for _, width in shapes)
    product = gemm.product(0, dtype, dtype, rows, columns, inner, pitches=pitches, batch=batch,
                           **kwargs)
    left, right, out = (torch.randn(batch, height, pitch, device='cuda').to(dtype)
                        for (height, _), pitch in zip(shapes, pitches, strict=True))
    before = out.clone()
    workspace = torch.empty(product.workspace, device='cuda', dtype=torch.uint8)
    product.run(*[t.data_ptr() for t in (left, right, out, workspace)])
    a, b = (t[..., :width].double() for t, (_, width) in zip((left, right), shapes, strict=False))
    expected = (a.mT if kwargs.get('left_t') else a) @ (b.mT if kwargs.get('right_t') else b)
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(out[..., :columns], expected) <= limit
    assert torch.equal(out[..., columns:], before[..., columns:])


@needs_gpu
def test_threads_that_share_a_product():
    """Each with a bias of its own, in a thread without a context."""
    runs = [make(64, 32, 48, torch.float16, torch.float16, right_t=True, bias=True)
            for _ in range(4)]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=lambda run=run: [run() for _ in range(200)])
               for run, *_ in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative_error(out, expected) <= 1e-3 for _, out, expected in runs)


@needs_gpu
def test_in_a_graph():
    run, out, expected = make(40, 24, 56, torch.float16, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    assert out.isnan().all()
    graph.replay()
    assert relative_error(out, expected) <= 1e-3


@needs_gpu
def test_an_impossible_product_raises():
    with pytest.raises(RuntimeError, match=r'product of \(4, 8\) and \(8, 4\) torch.float16 to '
                                           r'torch.bfloat16 by cuBLASLt failed'):
        gemm.product(0, torch.float16, torch.bfloat16, 4, 4, 8)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(gemm, 'cublas', lambda: None)
    assert 'libcublasLt' in gemm.why_not()


@pytest.mark.parametrize('version, tried', [(120403, True), (130100, True), (140000, False),
                                            (11803, False)])
def test_a_cuda_that_was_never_tried_is_refused(version, tried, monkeypatch):
    monkeypatch.setattr(gemm, 'cublas',
                        lambda: SimpleNamespace(cublasLtGetVersion=lambda: version))
    reason = gemm.why_not()
    assert reason is None if tried else 'never tried' in reason
