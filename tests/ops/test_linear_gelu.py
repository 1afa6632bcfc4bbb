"""The kernel of an MLP's first half, against fp64.

A device is 'cuda', or 'sm_90': such a GPU emulated on the CPU.
"""

import emulated_cuda
import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.ops import conv_mlp, mlp
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.fused.mlp import hidden
from vmamba_mm.ops.fused.mlp.hidden import SHAPES, Shape, hidden_layer

HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def capability(request):
    if 'place' in request.fixturenames and request.getfixturevalue('place') == 'cuda' \
            and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip('needs a GPU of compute capability 9.0')


@pytest.fixture
def cut(monkeypatch):
    def change(shape):
        monkeypatch.setattr(hidden, 'force', shape)
        launch.forget()

    yield change
    monkeypatch.undo()
    launch.forget()


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are asked for."""
    names, ask = [], launch.kernel

    def kernel(index, instance, *args):
        names.append(instance(*args).name.partition('<')[0])
        return ask(index, instance, *args)

    monkeypatch.setattr(hidden, 'kernel', kernel)
    return names


def make(place, rows, width, dim, dtype):
    rng = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=rng) for shape in ((rows, dim), (width, dim), (width,)))
    return [t.to(place, dtype) for t in (x, w / dim**0.5 * 2, b)]


def check(inputs, save):
    inner, result = hidden_layer(*inputs, save)
    x, w, b = (t.double() for t in inputs)
    exact = F.linear(x, w, b)
    pairs = [(result, F.gelu(exact))] + [(inner, exact)] * save
    for found, right in pairs:
        error = (found.double() - right).abs()
        # Half a unit in the last place, what short sums in fp32 lose, and GELU by a few terms.
        unit = torch.finfo(found.dtype).eps
        assert (error <= right.abs() * (0.5 * unit + 1e-4) + 1e-6).all(), error.max()


@pytest.mark.parametrize('dtype', [HALF, BRAIN], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_shapes_of_blocks(place, cut, launched, shape, dtype):
    """A part of the columns and of the rows that is not full; several tiles to a block."""
    cut(shape)
    width = shape.columns + 72
    check(make(place, 64 * 5 * shape.teams - 3, width, 40, dtype), save=dtype == BRAIN)
    assert launched == ['linear_gelu']


@pytest.mark.parametrize('rows, width, dim', [(1, 8, 8), (130, 384, 96), (70, 40, 200),
                                              (300, 128, 64)])
def test_sizes(place, cut, rows, width, dim):
    cut(Shape(2, 2, 4))
    check(make(place, rows, width, dim, HALF), save=True)


def test_values_beyond(place, cut):
    """NaN stays, and so does infinity; large numbers are as they are, or nothing."""
    cut(Shape(2, 2, 4))
    x, w, b = make(place, 64, 64, 64, HALF)
    b[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4, -3e4, -9.0])
    w[:6] = 0
    found = hidden_layer(x, w, b, save=False)[1][0, :6].tolist()
    assert found[0] != found[0] and found[1] == torch.inf and found[3] == float(b[3])
    assert found[4] == 0 and abs(found[5]) < 1e-7


def test_error_of_gelu_relative_to_its_value(place, cut):
    """In the tails too, down to where fp16 has no more digits."""
    cut(Shape(2, 2, 4))
    points = torch.linspace(-4.2, 6, 512, device=place).to(HALF)
    x, w = (torch.zeros(rows, 8, device=place, dtype=HALF) for rows in (1, 512))
    found, right = hidden_layer(x, w, points, save=False)[1][0].double(), F.gelu(points.double())
    assert ((found - right).abs() <= right.abs() * 6e-4 + 3e-8).all()


def test_ops_and_their_gradients(place, cut, launched):
    cut(Shape(2, 2, 4))
    x, w, b = make(place, 2 * 5 * 7, 64, 24, HALF)
    x, w2, b2 = x.view(2, 5, 7, 24), w.T.contiguous(), torch.zeros_like(w[0])
    taps, bias = torch.randn(64, 1, 3, 3, device=place, dtype=HALF) / 3, torch.zeros_like(b)
    for op, inputs in ((mlp, (x, w, b, w2, b2)), (conv_mlp, (x, w, b, taps, bias, w2, b2))):
        def run(backend_inputs, op=op):
            leaves = [t.detach().requires_grad_() for t in backend_inputs]
            y = op(*leaves)
            return y, *torch.autograd.grad(y.float().square().sum(), leaves)

        found = run(inputs)
        exact = run([t.double() for t in inputs])
        for one, right in zip(found, exact, strict=True):
            assert (one.double() - right).norm() <= 4e-3 * right.norm().clamp_min(1e-6)
    assert 'linear_gelu' in launched


@pytest.mark.parametrize('rows, width, dim, expected', [
    (401408, 384, 96, Shape(2, 3, 4)), (100352, 768, 192, Shape(2, 3, 4)),
    (25088, 1536, 384, Shape(1, 2, 3)), (6272, 3072, 768, None), (196, 1536, 384, None),
    (401408, 256, 64, Shape(2, 2, 4)), (25088, 1024, 256, Shape(2, 2, 4))])
def test_what_an_h200_is_expected_to_like(monkeypatch, rows, width, dim, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr(hidden, 'device_limits', lambda index: (132, 233472, 232448))
    assert hidden.shape_for(0, HALF, rows, width, dim) == expected


@pytest.mark.parametrize('capability, cuda, expected', [
    ((9, 0), '13.0', True), ((9, 0), None, True), ((9, 0), '11.8', False),
    ((8, 0), '13.0', False), ((10, 0), '13.0', False)])
def test_which_gpus_have_groups_of_warps(monkeypatch, capability, cuda, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    assert launch.has_groups_of_warps(0) == expected


def test_bit_equal_whichever_thread_is_first(place, cut, monkeypatch):
    cut(Shape(2, 2, 4))
    inputs = make(place, 300, 264, 72, HALF)
    first = hidden_layer(*inputs, save=True)
    for seed in (1, 2):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        assert all(map(torch.equal, hidden_layer(*inputs, save=True), first))
