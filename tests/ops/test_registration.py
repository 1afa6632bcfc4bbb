import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmamba_mm.ops.core.registration import flop_formula, register

ROWS, INNER = 3, 5


def define(name, factor=2.0):
    """``(x @ w * factor, x.sum(0))``, whose backward is an op too."""
    def bwd_fake(grad, x, w, total):
        return torch.empty_like(x), torch.empty_like(w)

    @register(f'{name}_bwd', fake=bwd_fake)
    def bwd(grad: Tensor, x: Tensor, w: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(total, x.sum(0))
        return grad @ w.T * factor, x.T @ grad * factor

    def backward(ctx, grad):
        return *bwd(grad, *ctx.saved_tensors), None

    def fake(x, w, label):
        return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[1])

    @register(name, fake=fake, backward=backward,
              setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2],
                                                                              output[1]))
    def fwd(x: Tensor, w: Tensor, label: str) -> tuple[Tensor, Tensor]:
        return x @ w * factor, x.sum(0)

    @flop_formula(name)
    def flops(x_shape, w_shape, *args, out_shape=None, **kwargs):
        return x_shape[0] * x_shape[1] * w_shape[1]

    return fwd


@pytest.fixture(scope='module')
def op():
    return define('test_product')


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()
            for shape in ((ROWS, INNER), (INNER, 4))]


def test_opcheck(op, inputs):
    opcheck(torch.ops.vmamba_mm.test_product.default, (*inputs, ''))
    x, w = (t.detach() for t in inputs)
    opcheck(torch.ops.vmamba_mm.test_product_bwd.default, (x @ w, x, w, x.sum(0)))


def test_opcheck_finds_a_result_that_shares_memory():
    @register('test_alias', fake=torch.empty_like)
    def alias(x: Tensor) -> Tensor:
        return x.view(x.shape)

    with pytest.raises(Exception, match='not defined to alias output but was aliasing'):
        opcheck(torch.ops.vmamba_mm.test_alias.default, (torch.ones(2),))


def test_gradients(op, inputs):
    assert torch.autograd.gradcheck(lambda x, w: op(x, w, '')[0], inputs)
    y, total = op(*inputs, '')
    assert y.requires_grad and not total.requires_grad
    only, = torch.autograd.grad(op(inputs[0].detach(), inputs[1], '')[0].sum(), inputs[1])
    assert torch.equal(only, torch.autograd.grad(y.sum(), inputs[1])[0])


def test_nothing_is_recorded_without_need(op, inputs):
    with torch.no_grad():
        assert op(*inputs, '')[0].grad_fn is None
    with torch.inference_mode():
        assert op(*inputs, '')[0].is_inference()
    assert op(*(t.detach() for t in inputs), '')[0].grad_fn is None


def test_a_second_derivative_raises(op, inputs):
    grad, = torch.autograd.grad(op(*inputs, '')[0].sum(), inputs[0], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match='vmamba_mm::test_product_bwd has no backward'):
        grad.sum().backward()


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('compiler', ['aot_eager', 'inductor'])
def test_compiles_as_one_graph(op, inputs, compiler, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: op(x.sin(), w, '')[0].square(), fullgraph=True,
                             backend=compiler, dynamic=dynamic)
    expected = op(inputs[0].sin(), inputs[1], '')[0].square()
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected)
    for found, other in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, expected)),
                            strict=True):
        torch.testing.assert_close(found, other)


def test_a_dispatch_mode_sees_each_op_once(op, inputs):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), Watch(), FlopCounterMode(display=False) as counter:
        y = op(*inputs, '')[0]
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    ours = [name for name in seen if 'vmamba_mm' in name]
    assert ours == ['vmamba_mm._test_product.default'] * 2 + [
        'vmamba_mm._test_product_bwd.default'] * 2
    assert counter.get_total_flops() == ROWS * INNER * 4


def test_autocast_is_off_inside(op, inputs):
    x, w = (t.float() for t in inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert (x @ w).dtype == torch.bfloat16
        for call in (op, torch.ops.vmamba_mm.test_product):
            y = call(x, w, '')[0]
            assert y.dtype == torch.float32
            torch.autograd.grad(y.sum(), x, retain_graph=True)


def test_traces_and_transforms(op, inputs):
    x, w = (t.detach() for t in inputs)
    expected = op(x, w, '')[0]
    traced = torch.jit.trace(lambda x, w: op(x, w, '')[0], inputs)
    assert 'vmamba_mm::test_product' in str(traced.graph)
    assert torch.equal(traced(x, w), expected)
    batched = torch.func.vmap(lambda x: op(x, inputs[1], '')[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], 2 * expected)


def test_registered_again(inputs):
    """As when a module is imported anew: the name means the later function."""
    before = define('test_again', 2.0)(*inputs, '')[0]
    after = define('test_again', 3.0)(*inputs, '')[0]
    torch.testing.assert_close(after, 1.5 * before)
    assert torch.equal(torch.ops.vmamba_mm.test_again(*inputs, '')[0], after)
    grad, = torch.autograd.grad(after.sum(), inputs[0])
    torch.testing.assert_close(grad, 3 * inputs[1].sum(1).expand(ROWS, INNER))
