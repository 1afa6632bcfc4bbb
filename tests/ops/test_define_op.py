from contextlib import nullcontext

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmamba_mm.ops.core import torch_private
from vmamba_mm.ops.core.define_op import Implementation, define_op

ROWS, INNER = 3, 5


def define(name, factor=2.0, **kwargs):
    """``(x @ w * factor, x.sum(0))``, whose second result is kept for the backward."""
    def multiply(x, w, label):
        return x @ w * factor

    def backward(grad, x, w, total):
        assert torch.equal(total, x.sum(0))
        return grad @ w.T * factor, x.T @ grad * factor

    options = dict(
        reference=multiply,
        fake=lambda x, w, label: (x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[1])),
        implementations={'torch': Implementation(
            lambda *args: (multiply(*args), args[0].sum(0)), backward, saves=True)},
        saves='x w total',
        flops=lambda x, w, **_: x[0] * x[1] * w[1])
    return define_op(name, '(Tensor x, Tensor w, str label) -> (Tensor y, Tensor total)',
                     **options | kwargs)


@pytest.fixture(scope='module', params=['direct', 'custom_op'])
def product(request):
    """The op as it is, and where torch lacks a private name."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 'custom_op':
            patch.setattr(torch_private, 'MISSING', ('torch._C._gone',))
        return define(f'test_{request.param}')


def registered(product, suffix=''):
    return getattr(torch.ops.vmamba_mm, product.__name__ + suffix)


def test_torch_has_every_private_name():
    assert not torch_private.MISSING, (
        f'torch {torch.__version__} lacks {torch_private.MISSING}: ops are registered by '
        'torch.library.custom_op, which is slower; see ops/core/torch_private.py')


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()
            for shape in ((ROWS, INNER), (INNER, 4))]


def test_opcheck(product, inputs):
    opcheck(registered(product).default, (*inputs, ''))
    x, w = (t.detach() for t in inputs)
    opcheck(registered(product, '_bwd').default, (x @ w, x, w, x.sum(0)))


def test_opcheck_finds_a_result_that_shares_memory():
    define_op('test_alias', '(Tensor x) -> Tensor', reference=lambda x: x, fake=torch.empty_like,
              implementations={'torch': Implementation(lambda x: x.view(x.shape))})
    with pytest.raises(Exception, match='not defined to alias output but was aliasing'):
        opcheck(torch.ops.vmamba_mm.test_alias.default, (torch.ones(2),))


def test_gradients(product, inputs):
    assert torch.autograd.gradcheck(lambda x, w: product(x, w, ''), inputs)
    y = product(*inputs, '')
    assert y.requires_grad
    assert not registered(product)(*inputs, '')[1].requires_grad
    only, = torch.autograd.grad(product(inputs[0].detach(), inputs[1], '').sum(), inputs[1])
    assert torch.equal(only, torch.autograd.grad(y.sum(), inputs[1])[0])


def test_nothing_is_recorded_without_need(product, inputs):
    with torch.no_grad():
        assert product(*inputs, '').grad_fn is None
    with torch.inference_mode():
        assert product(*inputs, '').is_inference()
    assert product(*(t.detach() for t in inputs), '').grad_fn is None


def test_a_second_derivative_raises(product, inputs):
    grad, = torch.autograd.grad(product(*inputs, '').sum(), inputs[0], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match=f'vmamba_mm::{product.__name__}_bwd has no backward'):
        grad.sum().backward()


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('compiler', ['aot_eager', 'inductor'])
def test_compiles_as_one_graph(product, inputs, compiler, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: product(x.sin(), w, '').square(), fullgraph=True,
                             backend=compiler, dynamic=dynamic)
    expected = product(inputs[0].sin(), inputs[1], '').square()
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected)
    for found, other in zip(*(torch.autograd.grad(t.sum(), inputs) for t in (y, expected)),
                            strict=True):
        torch.testing.assert_close(found, other)


def test_a_dispatch_mode_sees_each_op_once(product, inputs):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), Watch(), FlopCounterMode(display=False) as counter:
        y = product(*inputs, '')
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    ours = [name for name in seen if 'vmamba_mm' in name]
    prefix = '' if 'custom_op' in product.__name__ else '_'
    assert ours == [f'vmamba_mm.{prefix}{product.__name__}.default'] * 2 + [
        f'vmamba_mm.{prefix}{product.__name__}_bwd.default'] * 2
    assert counter.get_total_flops() == 3 * ROWS * INNER * 4


def test_autocast_is_off_inside(product, inputs):
    x, w = (t.float() for t in inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert (x @ w).dtype == torch.bfloat16
        for y in (product(x, w, ''), registered(product)(x, w, '')[0]):
            assert y.dtype == torch.float32
            torch.autograd.grad(y.sum(), x, retain_graph=True)


def test_traces_and_transforms(product, inputs):
    x, w = (t.detach() for t in inputs)
    expected = product(x, w, '')
    traced = torch.jit.trace(lambda x, w: product(x, w, ''), inputs)
    assert f'vmamba_mm::{product.__name__}' in str(traced.graph)
    assert torch.equal(traced(x, w), expected)
    batched = torch.func.vmap(lambda x: product(x, inputs[1], ''))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], 2 * expected)


def test_registered_again(inputs):
    """As when a module is imported anew: the name means the later function."""
    before = define('test_again', 2.0)(*inputs, '')
    after = define('test_again', 3.0)(*inputs, '')
    torch.testing.assert_close(after, 1.5 * before)
    assert torch.equal(torch.ops.vmamba_mm.test_again(*inputs, '')[0], after)
    grad, = torch.autograd.grad(after.sum(), inputs[0])
    torch.testing.assert_close(grad, 3 * inputs[1].sum(1).expand(ROWS, INNER))


# --- which implementation runs --------------------------------------------------------------------

def define_named(name, asked, takes=()):
    """x times 1 (the reference), 2 ('cuda', of the lengths it ``takes``) or 3 ('chunked')."""
    def scaled(factor):
        return Implementation(lambda x: x * factor, lambda grad, x: grad * factor)

    def why_not(x):
        asked.append('cuda')
        return None if len(x) in takes else 'it is too long'

    cuda = Implementation(scaled(2).forward, scaled(2).backward, why_not)
    return define_op(name, '(Tensor x, str backend) -> Tensor', reference=lambda x: x * 1,
                     fake=lambda x, backend: torch.empty_like(x), saves='x',
                     implementations={'cuda': cuda, 'chunked': scaled(3)})


def test_backend_is_decided_once_per_call(monkeypatch):
    asked, x = [], torch.ones(2, requires_grad=True)
    product = define_named('test_chosen', asked, takes=(2,))
    assert product(x)[0] == 3 and not asked  # no kernel is for a CPU
    monkeypatch.setattr('vmamba_mm.ops.core.backends.KERNEL_DEVICES', ('cpu',))
    for backend, factor, times in ((None, 2, 1), ('cuda', 2, 1), ('chunked', 3, 0),
                                   ('reference', 1, 0)):
        asked.clear()
        grad, = torch.autograd.grad(product(x, backend=backend).sum(), x)
        assert grad[0] == factor and len(asked) == times
    assert product(torch.ones(3))[0] == 3
    with pytest.raises(ValueError, match="'cuda' does not take these inputs: it is too long"):
        product(torch.ones(3), backend='cuda')
    with pytest.raises(ValueError, match="'cudo'.*one of .'reference', 'chunked', 'cuda'"):
        product(x, backend='cudo')


def test_reference_runs_where_nothing_takes_the_inputs():
    product = define('test_refused', implementations={'cuda': Implementation(
        None, why_not=lambda *args: 'never')})
    x, w = torch.ones(2, 3), torch.ones(3, 4)
    assert torch.equal(product(x, w, ''), x @ w * 2)
    assert product(x, w, '', otherwise=lambda *args: 'else') == 'else'


def test_an_absent_tensor_has_no_gradient():
    add = Implementation(lambda x, y: x if y is None else x + y,
                         lambda grad, x, y: (grad.clone(), None if y is None else grad.clone()))
    product = define_op('test_optional', '(Tensor x, Tensor? y) -> Tensor', reference=add.forward,
                   fake=lambda x, y: torch.empty_like(x), saves='x y',
                   implementations={'torch': add})
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert all(torch.equal(grad, torch.ones(2))
               for grad in torch.autograd.grad(product(x, y).sum(), (x, y)))
    assert torch.equal(*torch.autograd.grad((product(x * 1, None) * 1).sum(), x), torch.ones(2))
    _, empty = torch.ops.vmamba_mm.test_optional_bwd(torch.ones(2), x.detach(), None)
    assert empty.numel() == 0


@pytest.mark.parametrize('watch_backward', [False, True])
@pytest.mark.parametrize('watch_forward', [False, True])
def test_a_mode_may_watch_a_part(inputs, watch_forward, watch_backward):
    """The backward finds what it needs, whichever way the forward went."""
    product = define('test_part', implementations={'torch': Implementation(
        lambda x, w, label: x @ w * 2, lambda grad, x, w: (grad @ w.T * 2, x.T @ grad * 2))})
    with FlopCounterMode(display=False) if watch_forward else nullcontext():
        y = product(*inputs, '')
    with FlopCounterMode(display=False) if watch_backward else nullcontext() as counter:
        found = torch.autograd.grad(y, inputs, torch.ones_like(y))
    if watch_backward:
        assert counter.get_total_flops() == 2 * ROWS * INNER * 4
    for grad, right in zip(found, torch.autograd.grad((inputs[0] @ inputs[1] * 2).sum(), inputs),
                           strict=True):
        torch.testing.assert_close(grad, right)


def test_a_result_that_was_not_asked_for():
    double = Implementation(lambda x, ask: (x * 2, x.sum(0) if ask else None),
                            lambda grad, grad_total, x: grad * 2)
    product = define_op(
        'test_not_asked', '(Tensor x, bool ask) -> (Tensor y, Tensor total)', results=2, saves='x',
        reference=double.forward, implementations={'torch': double},
        fake=lambda x, ask: (torch.empty_like(x), x.new_empty(x.shape[1:] if ask else 0)))
    x = torch.ones(3, 2, requires_grad=True)
    y, total = product(x, False)
    assert total is None and product(x, True)[1].shape == (2,)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3, 2), 2.))
    assert torch.ops.vmamba_mm.test_not_asked(x, False)[1].numel() == 0
    opcheck(torch.ops.vmamba_mm.test_not_asked.default, (x, False))


@pytest.mark.parametrize(('schema', 'kwargs', 'message'), [
    ('(Tensor x, Tensor w, str label) -> (Tensor y, Tensor total)', dict(reference=None),
     'needs a reference'),
    ('(Tensor x, str backend, Tensor w) -> Tensor', {}, 'must come last'),
    ('(Tensor x, Tensor w, str label) -> (Tensor y, Tensor total)', dict(saves='label x w'),
     'tensors first'),
    ('(Tensor x) -> Tensor', dict(implementations={}), 'need an argument backend')])
def test_definitions_that_cannot_be(schema, kwargs, message):
    options = dict(reference=torch.sin, fake=torch.empty_like,
                   implementations={'torch': Implementation(torch.sin, torch.cos)}) | kwargs
    with pytest.raises(ValueError, match=message):
        define_op('test_wrong', schema, **options)
