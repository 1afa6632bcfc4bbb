"""Every op on every implementation and device: what the specs in ``op_specs/`` ask for.

A device is 'cpu', 'cuda', or 'sm_90' and 'sm_75': the CUDA kernels of such a GPU, emulated on the
CPU (emulated_cuda.py). With TRITON_INTERPRET=1, set before triton is imported, it is 'interpreter'
alone (test_triton.py starts such a process).
"""

import contextlib
import doctest
import os
import sys

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulated_gpu
from op_specs import MODULES, all_specs
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vmamba_mm.ops
from vmamba_mm.ops.core.define_op import OPS
from vmamba_mm.testing import assert_close, relative_error

SPECS = all_specs()
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: runs of what a user would write, whose largest error counts: in a gradient of two elements, that
#: of a single run is by chance
ROUNDINGS = 16
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
NVIDIA = pytest.mark.gpu(nvidia=True)


def places(spec):
    """(backend, device, whether that is a kernel)."""
    if INTERPRETED:
        return [('triton', 'interpreter', True)] if 'triton' in spec.kernels else []
    plain = [name for name in spec.backends if name not in ('cuda', 'triton')] or [None]
    found = [(backend, device, False) for backend in plain for device in ('cpu', 'cuda')]
    if 'cuda' in spec.kernels:
        backend = 'cuda' if 'cuda' in spec.backends else None
        found += [(backend, device, True) for device in ('sm_90', 'sm_75', 'cuda')
                  if device == 'cuda' or int(device[3:]) >= spec.capability]
    if 'triton' in spec.kernels:
        found.append(('triton', 'cuda', True))
    return found


def cases(name, choose):
    """``name`` is an argument of the test; ``choose(spec, backend, device, is_kernel)`` gives its
    values. The argument ``op`` is for tests/budget.py."""
    params = []
    for spec in SPECS:
        for backend, device, is_kernel in places(spec):
            marks = [NVIDIA] if device == 'cuda' and is_kernel and backend != 'triton' else []
            for value in choose(spec, backend, device, is_kernel):
                label = 'x'.join(map(str, value)) if isinstance(value, tuple) else value
                label = str(label).removeprefix('torch.')
                params.append(pytest.param(
                    spec.name.removesuffix('_fwd'), spec, backend, device, value, marks=marks,
                    id=f'{spec}-{backend or "default"}{"" if is_kernel else "-plain"}-{device}-'
                       f'{label}'))
    return pytest.mark.parametrize(('op', 'spec', 'backend', 'device', name), params)


def shapes(spec, backend, device, is_kernel):
    if device == 'interpreter':
        return spec.interpreter_shapes
    if not is_kernel:
        return spec.shapes
    return spec.kernel_shapes + (spec.gpu_shapes if device == 'cuda' else ())


def first_shape(spec, backend, device, is_kernel):
    """None for a second emulated GPU, on which numbers are all that can differ, and in the slow
    interpreter for a second way to call an op."""
    if device == 'sm_75' or device == 'interpreter' and spec.id:
        return ()
    return shapes(spec, backend, device, is_kernel)[:1]


def first_shape_of_op(spec, backend, device, is_kernel):
    """Where the registered op runs, and not PyTorch's own ones."""
    implementations = OPS[spec.name].implementations
    runs = backend in implementations or backend is None and (
        is_kernel or 'torch' in implementations)
    return first_shape(spec, backend, device, is_kernel) if runs else ()


def first_shape_of_counted(spec, backend, device, is_kernel):
    """Where torch counts FLOPs: not those of a scan position by position."""
    return () if backend == 'reference' else first_shape(spec, backend, device, is_kernel)


def halves(spec, backend, device, is_kernel):
    found = spec.half_shapes if is_kernel else spec.shapes[:1]
    if device == 'interpreter':
        found = () if spec.id else spec.interpreter_shapes[:1]
    dtypes = (HALF,) if device == 'sm_75' else (HALF, BRAIN)
    # 'pure' has parameters in half precision too.
    return [(shape, dtype, pure) for shape in found for dtype in dtypes for pure in (False, True)]


@pytest.fixture
def place(device, compiled):
    """The device of tensors, in a context where the kernels run on it."""
    with contextlib.ExitStack() as stack:
        if device.startswith('sm_'):
            if sys.platform != 'linux' or emulated_cuda.COMPILER is None \
                    and not os.environ.get('CI'):
                pytest.skip('needs Linux and a C++ compiler')
            stack.enter_context(emulated_gpu(compiled, (int(device[3]), int(device[4]))))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield 'cuda' if device == 'cuda' else 'cpu'


def make(spec, shape, device, dtype=DOUBLE, parameters=None):
    return {name: t.to(device, dtype if name in spec.maps else parameters or dtype)
            for name, t in spec.make(*shape).items()}


def results_of(found):
    found = found if isinstance(found, tuple) else (found,)
    return [t for t in found if t is not None]


def run(spec, function, inputs):
    """(results, gradients by the inputs) for fixed gradients by the results."""
    if not spec.has_gradient:
        return results_of(function(inputs)), {}
    leaves = {name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
              for name, t in inputs.items()}
    results = results_of(function(leaves))
    rng = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=rng, dtype=DOUBLE).to(t.device, t.dtype)
             for t in results]
    grads = torch.autograd.grad(results, list(leaves.values()), given)
    return [t.detach() for t in results], dict(zip(leaves, grads, strict=True))


def exact(spec, inputs, shape):
    """By the reference and autograd, in fp64; where that would be a loop over all positions of a
    large map, by the parallel PyTorch that small maps hold to the reference."""
    reference = OPS[spec.name].reference
    is_loop = 'chunked' in spec.backends and shape in spec.gpu_shapes
    return run(spec, lambda leaves: call(spec, leaves, 'chunked') if is_loop else
               reference(*spec.arguments(leaves, DOUBLE)),
               {name: t.double() for name, t in inputs.items()})


def call(spec, inputs, backend, **options):
    if backend is not None:
        options['backend'] = backend
    return spec.call(inputs, **options)


def error(actual, expected):
    """Relative, in the 2-norm: a maximum over few elements would be luck."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def by_name(results_and_grads):
    """Results by their numbers and gradients by their names."""
    results, grads = results_and_grads
    return dict(enumerate(results)) | grads


def rounded_otherwise(inputs, dtype, seed):
    """The inputs with changes as large as their rounding to ``dtype``."""
    rng = torch.Generator().manual_seed(seed)
    return {name: t * (1 + torch.finfo(dtype).eps * (
        2 * torch.rand(t.shape, generator=rng, dtype=DOUBLE) - 1)).to(t)
        for name, t in inputs.items()}


# --- numbers --------------------------------------------------------------------------------------

@cases('shape', shapes)
def test_results_and_every_gradient(op, spec, backend, device, shape, place):
    is_kernel = (backend in ('cuda', 'triton') or device.startswith('sm_')
                 or device == 'cuda' and not spec.shapes)
    for dtype in (SINGLE,) if is_kernel else (DOUBLE, SINGLE):
        inputs = make(spec, shape, place, dtype)
        expected, expected_grads = exact(spec, inputs if is_kernel else make(spec, shape, place),
                                         shape)

        def check(found, grads):
            close_enough = Closeness(spec, inputs, shape, spec.limits[dtype])  # noqa: B023
            for i, (one, right) in enumerate(zip(found, expected, strict=True)):  # noqa: B023
                assert one.dtype == dtype  # noqa: B023
                close_enough(one, right, i)
            for name, grad in grads.items():
                assert grad.dtype == dtype  # noqa: B023
                close_enough(grad, expected_grads[name], name)  # noqa: B023

        check(*run(spec, lambda leaves: call(spec, leaves, backend), inputs))  # noqa: B023
        with torch.no_grad():  # for which some have another kernel
            check(results_of(call(spec, inputs, backend)), {})


class Closeness:
    """Asserts that results, by their places, and gradients, by their names, are within ``limit`` of
    the right ones, or on large maps within twice the error of plain PyTorch in the same dtype."""

    def __init__(self, spec, inputs, shape, limit):
        self.spec, self.inputs, self.limit = spec, inputs, limit
        self.has_plain = 'chunked' in spec.backends and shape in spec.gpu_shapes
        self.plain = None

    def __call__(self, one, right, what):
        limit = self.limit
        if self.has_plain and relative_error(one, right) > limit:
            if self.plain is None:
                results, grads = run(self.spec, lambda leaves: call(self.spec, leaves, 'chunked'),
                                     self.inputs)
                self.plain = dict(enumerate(results)) | grads
            limit = max(limit, 2 * relative_error(self.plain[what], right))
        assert_close(one, right, limit,
                     f'gradient by {what}' if isinstance(what, str) else 'result')


@cases('case', halves)
def test_half_precision(op, spec, backend, device, case, place):
    """At most twice the error of what a user would write, and as accurate as fp32 if asked."""
    shape, dtype, pure = case
    inputs = make(spec, shape, place, dtype, dtype if pure else SINGLE)
    right = by_name(exact(spec, inputs, shape))

    def naive(leaves):
        arguments = spec.arguments(leaves, dtype)
        with torch.autocast(place, dtype, enabled=not pure):
            return (spec.naive or OPS[spec.name].reference)(*arguments)

    def error_of_naive(name, seed):
        others = rounded_otherwise(inputs, dtype, seed)
        return error(by_name(run(spec, naive, others))[name],
                     by_name(exact(spec, others, shape))[name])

    of_naive = {name: error(one, right[name])
                for name, one in by_name(run(spec, naive, inputs)).items()}
    floor = spec.roundings * torch.finfo(dtype).eps / 2

    def assert_good(found):
        for name, one in found.items():
            assert one.shape == right[name].shape
            own = error(one, right[name])
            for seed in range(ROUNDINGS):
                if own <= 2 * max(of_naive[name], floor):
                    break
                of_naive[name] = max(of_naive[name], error_of_naive(name, seed))
            assert own <= 2 * max(of_naive[name], floor), name

    with torch.autocast(place, dtype, enabled=not pure):
        results, grads = run(spec, lambda leaves: call(spec, leaves, backend), inputs)
    assert all(grad.dtype == inputs[name].dtype for name, grad in grads.items())
    assert_good(by_name((results, grads)))
    with torch.no_grad(), torch.autocast(place, dtype, enabled=not pure):
        assert_good(by_name((results_of(call(spec, inputs, backend)), {})))
    if backend in ('reference', 'chunked', 'triton') and spec.takes_out_dtype:
        single = results_of(call(spec, inputs, backend, out_dtype=SINGLE))
        for number, one in enumerate(single):
            assert_close(one, right[number], 1e-5)


@cases('shape', first_shape)
def test_nan_stays_in_its_sample(op, spec, backend, device, shape, place):
    inputs = make(spec, shape, place, SINGLE)
    clean = results_of(call(spec, inputs, backend))
    one = inputs[spec.maps[0]]
    one[(1, *[size // 2 for size in one.shape[1:]])] = torch.nan
    for before, after in zip(clean, results_of(call(spec, inputs, backend)), strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[2:], after[2:])
        assert after[1].isnan().any()


def permuted(t):
    """The same numbers, in memory in the reverse order of dimensions."""
    order = tuple(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def second_last(t):
    """The same numbers, the second dimension adjacent in memory: channels last, or sequences of
    channels by ``transpose(1, 2)``."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def shifted(t):
    """The same numbers, one element beyond a multiple of 16 bytes."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def spread(t):
    """The same numbers with gaps between them."""
    return t.repeat_interleave(2, t.dim() - 1)[..., ::2]


@cases('shape', first_shape)
def test_any_strides(op, spec, backend, device, shape, place):
    """Inputs and gradients may lie in memory as they like: the numbers are the same."""
    inputs = make(spec, shape, place, SINGLE)

    def run_moved(move):
        leaves = {name: move(t).detach().requires_grad_(spec.has_gradient)
                  for name, t in inputs.items()}
        results = results_of(call(spec, leaves, backend))
        rng = torch.Generator().manual_seed(1)
        given = [move(torch.randn(t.shape, generator=rng).to(t)) for t in results]
        if not spec.has_gradient:
            return results
        return [*results, *torch.autograd.grad(results, list(leaves.values()), given)]

    expected = run_moved(torch.Tensor.contiguous)
    for move in (permuted, shifted, spread):
        for one, right in zip(run_moved(move), expected, strict=True):
            assert_close(one, right, 2e-5, move.__name__)


@cases('shape', lambda spec, *place: first_shape(spec, *place) if spec.shapes else ())
def test_empty_batch(op, spec, backend, device, shape, place):
    if spec.name == 'reorder' or backend == 'cuda':
        backend = None  # a kernel by name refuses it
    inputs = make(spec, shape, place, SINGLE)
    inputs.update({name: inputs[name][:0] for name in spec.maps})
    results, grads = run(spec, lambda leaves: call(spec, leaves, backend), inputs)
    assert all(len(t) == 0 for t in results)
    assert not any(grad.any() for grad in grads.values())


@cases('shape', lambda spec, backend, device, is_kernel:
       spec.kernel_shapes[:1] * (is_kernel and device != 'interpreter'))
def test_bit_equal_from_run_to_run(op, spec, backend, device, shape, place, monkeypatch):
    """Whichever thread is first: gradients by parameters are sums over all of them."""
    inputs = make(spec, shape, place, SINGLE)
    first, grads = run(spec, lambda leaves: call(spec, leaves, backend), inputs)
    for seed in (1, 2):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again, grads_again = run(spec, lambda leaves: call(spec, leaves, backend), inputs)
        assert all(map(torch.equal, again, first))
        assert all(torch.equal(grads_again[name], grads[name]) for name in grads)


class Calls(TorchDispatchMode):
    """The names of the ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix('vmamba_mm::').removeprefix('_'))
        return func(*args, **(kwargs or {}))


@cases('shape', lambda spec, backend, device, is_kernel:
       spec.half_shapes[:1] * (is_kernel and not INTERPRETED))
def test_kernel_is_chosen_by_default(op, spec, backend, device, shape, place):
    inputs = make(spec, shape, place, HALF)
    with torch.no_grad(), Calls() as calls:
        found = results_of(call(spec, inputs, None))
    assert spec.name in calls.names
    if backend != 'triton':
        assert all(map(torch.equal, found, results_of(call(spec, inputs, backend))))


# --- dtypes ---------------------------------------------------------------------------------------

@cases('shape', first_shape)
def test_dtypes_are_obeyed(op, spec, backend, device, shape, place):
    """What is asked for, on every device, with and without autocast."""
    if backend == 'cuda':
        backend = None  # a kernel by name refuses some
    autocast = HALF if device == 'sm_75' else BRAIN
    for dtype in (SINGLE, autocast):
        inputs = make(spec, shape, place, dtype)
        for casts in (False, True):
            default = spec.autocast_dtype if casts and spec.autocast_dtype else dtype
            for out_dtype in (None, SINGLE, autocast) if spec.takes_out_dtype else (None,):
                options = {} if out_dtype is None else dict(out_dtype=out_dtype)
                with torch.autocast(place, autocast, enabled=casts), torch.no_grad():
                    *_, last = results_of(call(spec, inputs, backend, **options))
                if casts and spec.name in ('mlp', 'conv_mlp', 'linear_relu', 'conv_norm_gelu',
                                           'masa', 'masa_mixer', 'mamba_block_fwd', 'mamba_blocks'):
                    default = autocast  # a matrix product's
                assert last.dtype == (out_dtype or default) and last.isfinite().all()


# --- PyTorch --------------------------------------------------------------------------------------

plain = cases('shape', lambda spec, backend, device, is_kernel:
              () if is_kernel or device == 'cuda' else spec.shapes[:1])


@cases('shape', lambda spec, backend, device, is_kernel:
       spec.shapes[:1] * (spec.has_exact_gradient and not is_kernel and device != 'cuda'))
def test_gradcheck(op, spec, backend, device, shape, place):
    inputs = {name: t.requires_grad_() for name, t in make(spec, shape, place).items()}
    assert torch.autograd.gradcheck(
        lambda *leaves: call(spec, dict(zip(inputs, leaves, strict=True)), backend),
        tuple(inputs.values()), fast_mode=True)


def registered(spec, inputs, backend, save):
    """The op and its arguments."""
    arguments = list(spec.arguments(inputs, SINGLE))
    schema = OPS[spec.name].schema
    if 'str backend' in schema:
        arguments.append(backend)
    if 'bool save' in schema:
        arguments.append(save)
    return getattr(torch.ops.vmamba_mm, spec.name).default, arguments


@cases('shape', first_shape_of_op)
def test_opcheck(op, spec, backend, device, shape, place):
    """Schema, fake and autograd agree with what the op does; so do those of its backward."""
    has_backward = any(one.backward for one in OPS[spec.name].implementations.values())
    for grad in (False, True) if has_backward else (False,):
        inputs = {name: t.requires_grad_(grad)
                  for name, t in make(spec, shape, place, SINGLE).items()}
        registered_op, arguments = registered(spec, inputs, backend, grad and backend != 'chunked')
        opcheck(registered_op, arguments, test_utils=(
            'test_schema', 'test_autograd_registration', 'test_faketensor',
            *(['test_aot_dispatch_dynamic'] if device == 'cpu' else [])))


@cases('shape', first_shape_of_op)
def test_strides_are_those_of_the_fake(op, spec, backend, device, shape, place):
    """A compiled graph goes by the fakes: results and gradients lie in memory as these say."""
    def strides(inputs, moved):
        results = results_of(call(spec, inputs, backend))
        found = dict(enumerate(results))
        if spec.has_gradient:
            grads = torch.autograd.grad(results, [*inputs.values()], [*map(moved, results)])
            found.update(zip(inputs, grads, strict=True))
        # Of a dimension of one element the stride means nothing.
        return {name: [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]
                for name, t in found.items()}

    plain = make(spec, shape, place, SINGLE)
    for move in (torch.Tensor.contiguous, second_last, permuted, spread):
        inputs = {name: move(t).requires_grad_(spec.has_gradient) for name, t in plain.items()}
        found = strides(inputs, move)
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(t) for name, t in inputs.items()}
            assert found == strides(fakes, move), move.__name__


@plain
def test_meta(op, spec, backend, device, shape, place):
    """On meta tensors, shapes and dtypes without numbers."""
    inputs = make(spec, shape, place, SINGLE)
    meta = results_of(call(spec, {name: t.to('meta') for name, t in inputs.items()}, backend))
    for one, right in zip(meta, results_of(call(spec, inputs, backend)), strict=True):
        assert one.is_meta and (one.shape, one.dtype) == (right.shape, right.dtype)


@cases('shape', first_shape)
def test_compiles_as_one_graph(op, spec, backend, device, shape, place):
    torch._dynamo.reset()
    inputs = make(spec, shape, place, SINGLE)
    is_kernel = backend in ('cuda', 'triton')
    compiler = 'inductor' if device == 'cuda' and is_kernel else 'aot_eager'

    def model(leaves):
        moved = {name: t.sin() if name == spec.maps[0] else t for name, t in leaves.items()}
        return [t.square() for t in results_of(call(spec, moved, backend))]

    expected, expected_grads = run(spec, lambda leaves: tuple(model(leaves)), inputs)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    results, grads = run(spec, lambda leaves: tuple(compiled(leaves)), inputs)
    for one, right in zip(results, expected, strict=True):
        assert_close(one, right, 1e-5)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-5, f'gradient by {name}')


@cases('shape', first_shape_of_counted)
def test_flops(op, spec, backend, device, shape, place):
    """Of the forward, and twice that of the backward."""
    inputs = {name: t.requires_grad_(spec.has_gradient)
              for name, t in make(spec, shape, place, SINGLE).items()}
    with FlopCounterMode(display=False) as counter:
        results = results_of(call(spec, inputs, backend))
        assert counter.get_total_flops() == spec.flops(shape)
        if spec.has_gradient:
            sum(t.sum() for t in results).backward()
    # Where the backward is PyTorch's own, torch counts it as it likes.
    if spec.has_gradient and (device.startswith('sm_') or spec.backends):
        assert counter.get_total_flops() == 3 * spec.flops(shape)


# --- wrong input ----------------------------------------------------------------------------------

@plain
def test_wrong_input_says_what_is_wrong(op, spec, backend, device, shape, place):
    inputs = make(spec, (2, *shape[1:]), place, SINGLE)
    for name, change, message in spec.wrong:
        with pytest.raises(ValueError, match=message):
            call(spec, inputs | {name: change(inputs[name])}, backend)
    if spec.backends:
        with pytest.raises(ValueError, match="backend='cudo' does not exist.*'reference'"):
            call(spec, inputs, 'cudo')
    if 'cuda' in spec.backends:
        with pytest.raises(ValueError, match="backend='cuda' does not take.*on cpu"):
            call(spec, inputs, 'cuda')


def test_every_op_has_a_spec():
    names = {name for name in OPS if not name.startswith('test_')}
    assert names == {spec.name for spec in SPECS}, f'a spec is missing in {MODULES}'
    for spec in SPECS:
        assert spec.wrong or spec.name == 'reorder' or spec.id or not spec.shapes


PUBLIC = {'layer_norm', 'rms_norm'} | {spec.name.removesuffix('_fwd') for spec in SPECS}


@pytest.mark.parametrize('name', sorted(PUBLIC & {*vmamba_mm.ops.__all__}))
def test_examples_of_docstrings(name):
    function = getattr(vmamba_mm.ops, name)
    examples = doctest.DocTestFinder(recurse=False).find(
        function, name, globs=dict(vars(vmamba_mm.ops), torch=torch))
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.summarize().attempted > 0 == runner.summarize().failed
