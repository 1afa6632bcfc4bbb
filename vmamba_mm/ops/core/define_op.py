"""How an op is defined: one call gives it everything that PyTorch and this package ask of an op.

A call in eager mode goes past torch's dispatcher unless something watches what it does: small maps
would wait for it. ``torch.library.custom_op`` does the same work at two to three times the time:
per call it flattens arguments, builds key sets and compares every result with every input. It is
what runs where torch lacks a name of :mod:`vmamba_mm.ops.core.torch_private`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops.core import backends as devices
from vmamba_mm.ops.core import torch_private
from vmamba_mm.ops.core.backends import BACKENDS
from vmamba_mm.ops.core.torch_private import (
    are_transforms_active,
    below_autograd,
    count_dispatch_modes,
    is_legacy_batched,
    is_profiling,
    is_tracing,
    no_autocast,
    unwrap_if_dead,
)

NAMESPACE = 'vmamba_mm'
#: The definitions by name, for tests and tables.
OPS: dict[str, 'Op'] = {}
_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, float, str, torch.dtype}


@dataclass(frozen=True)
class Implementation:
    """One way to calculate an op, called with positional arguments.

    Args:
        forward: from the op's arguments (without ``backend`` and ``save``) to its results; with
            ``saves`` the argument ``save`` comes last, and all results of the schema are given,
            else only those that have a gradient. They share memory with nothing and have the
            strides that the fake has. None stands for a result that was not asked for: where a
            tensor is needed, it is an empty one of the first argument's dtype.
        backward: from the gradients by the results and what the op saves (of an implementation
            that does not ``save``, only what are arguments) to the gradients by the op's tensors.
        why_not: from the op's arguments to what keeps it from taking them, or None. An
            implementation without it takes everything, on every device.
        saves: whether the forward keeps more than arguments for the backward; or, from the op's
            arguments, whether it does for them.
    """

    forward: Callable
    backward: Callable | None = None
    why_not: Callable[..., str | None] | None = None
    saves: bool | Callable[..., bool] = False


@dataclass(frozen=True)
class Op:
    """The definition of an op, as :func:`define_op` was given it."""

    name: str
    schema: str
    reference: Callable
    implementations: Mapping[str, Implementation]
    call: Callable


def define_op(name: str, schema: str, *, reference: Callable, fake: Callable,
              implementations: Mapping[str, Implementation], results: int = 1, saves: str = '',
              no_grad: str = '', flops: Callable[..., int] | None = None,
              backward_fake: Callable | None = None, setup_context: Callable | None = None,
              backward: Callable | None = None) -> Callable:
    """Register ``torch.ops.vmamba_mm.<name>`` and, where there is one, its backward.

    The op runs below autograd, with autocast off: it has its own dtype policy. Modes and compiled
    graphs see ``_<name>``, of which autograd knows nothing: a compiled model would wait for Python
    twice otherwise. A name defined before, as by a module imported again, is replaced.

    Args:
        name: of the op; its backward is ``<name>_bwd``, an ending ``_fwd`` left out.
        schema: ``(Tensor x, Tensor? bias, float eps, ...) -> Tensor``. Two arguments have a
            meaning, and come last in this order: ``str backend``, the implementation that was
            chosen (needed where there are several), and ``bool save``, whether a gradient will be
            asked for. Results after the first ``results`` are what the forward keeps for the
            backward; ``-> (Tensor y, Tensor states)`` names them.
        reference: the op in plain PyTorch, from the op's arguments (without the two) to the
            results that have a gradient. Autograd gives its gradients. Tests hold every
            implementation to it, and it runs where none takes the inputs.
        fake: from all arguments to all results, of which only metadata counts.
        implementations: by name, in order of preference. Which one runs is decided once per call.
        results: how many results have a gradient.
        saves: names of the arguments and results that the backward gets after the gradients, in
            that order: first tensors, then others. ``wants_<tensor>`` is True if its gradient is
            wanted. Empty for an op without a backward, or with one of its own.
        no_grad: names of the tensors without a gradient.
        flops: from the shapes of tensors and the values of other arguments, by name, to what the
            forward calculates; the backward counts twice that, once where a ``wants_`` is False.
            Only what ``saves`` names may be used. None for 0.
        backward_fake: of the backward, from its arguments; by default the gradients are like the
            tensors, without gaps, and empty by an absent one.
        setup_context, backward: ``(ctx, inputs, output)`` and ``(ctx, *grads) -> gradients``, as
            for ``torch.autograd.Function``, for a backward of another form, in place of ``saves``.
            ``backward`` should call ops; a gradient by a result that was not used is None.

    Returns:
        What calls the op: ``op(*arguments, backend=None, otherwise=reference)``, with the arguments
        before ``backend`` and ``save``, for the results that have a gradient. ``otherwise`` gets
        the arguments where no implementation takes them.

    Raises:
        ValueError: from the call, on a ``backend`` that does not exist or does not take the inputs.
    """
    arguments, outputs = _parse(schema)
    names = [argument for _, argument in arguments]
    named, saving = 'backend' in names, 'save' in names
    size = len(names) - named - saving
    if names[size:] != ['backend'] * named + ['save'] * saving:
        raise ValueError(f'{name}: backend and save must come last, in this order: {schema}')
    if not callable(reference):
        raise ValueError(f'{name}: an op needs a reference, got {reference!r}')
    if not implementations or len(implementations) > 1 and not named:
        raise ValueError(f'{name}: several implementations need an argument backend: {schema}')

    def run(*args):
        chosen = implementations[args[size]]
        if chosen.saves:
            return chosen.forward(*args[:size], *args[size + 1:])
        return chosen.forward(*args[:size])

    if not named:
        run = next(iter(implementations.values())).forward

    def forward(*args):
        values = run(*args)
        if len(outputs) == 1:
            return values
        values = (values,) if isinstance(values, Tensor) else values
        return tuple([args[0].new_empty(0) if value is None else value
                      for value in (*values, *[None] * (len(outputs) - len(values)))])

    if saves:
        backward, setup_context = _define_backward(
            name, arguments[:size], outputs, results, saves.split(), no_grad.split(), named,
            implementations, backward_fake, flops)
    dispatch, run_eagerly = _register(name, schema, forward, fake, backward, setup_context,
                                      results, run)

    def formula(*args, out_shape=None, **kwargs):
        return flops(**dict(zip(names[:size], args, strict=False))) if flops else 0

    _count_flops(name, formula)
    tensors = tuple(i for i, (type_, argument) in enumerate(arguments[:size])
                    if type_ in ('Tensor', 'Tensor?') and argument not in no_grad.split())
    order = tuple((key, implementation.why_not, implementation.saves)
                  for key, implementation in implementations.items())
    is_single = len(outputs) == 1

    def call(*args, backend=None, otherwise=reference):
        if backend is None:
            on_kernels = args[0].device.type in devices.KERNEL_DEVICES
            for chosen in order:
                if chosen[1] is None or on_kernels and chosen[1](*args) is None:
                    break
            else:
                return otherwise(*args)
        elif backend == 'reference':
            return reference(*args)
        else:
            _check_backend(backend, implementations, args)
            chosen = backend, None, implementations[backend].saves
        watched = is_watched(args)
        # torch.jit.trace records one graph for calls with and without gradients.
        wants = watched and torch.jit.is_tracing()
        if not wants and torch.is_grad_enabled():
            for i in tensors:
                if args[i] is not None and args[i].requires_grad:
                    wants = True
                    break
        save = wants and (chosen[2](*args) if callable(chosen[2]) else chosen[2])
        if named:
            args = (*args, chosen[0])
        if saving:
            args = (*args, save)
        if not watched:
            return run_eagerly(wants, *args)
        values = dispatch(*args)
        if is_single:
            return values
        return values[0] if results == 1 else values[:results]

    call.__name__ = call.__qualname__ = name
    OPS[name] = Op(name, schema, reference, implementations, call)
    return call


def _check_backend(backend: str, implementations: Mapping[str, Implementation], args: tuple
                   ) -> None:
    """Raise ValueError if there is no implementation of that name or it refuses ``args``."""
    if backend not in implementations:
        known = tuple(key for key in BACKENDS if key == 'reference' or key in implementations)
        raise ValueError(f'backend={backend!r} does not exist; choose None or one of {known}')
    why_not = implementations[backend].why_not
    reason = None if why_not is None else why_not(*args)
    if reason is not None:
        raise ValueError(f'backend={backend!r} does not take these inputs: {reason}; choose None '
                         "or 'chunked'")


def _parse(schema: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (type, name) of each argument, and the names of the results, empty for none."""
    inputs, _, returned = schema.removeprefix('(').partition(') -> ')
    arguments = [tuple(argument.split()) for argument in inputs.split(', ')]
    results = returned.removeprefix('(').removesuffix(')').split(', ')
    return arguments, [result.partition(' ')[2] for result in results]


def _define_backward(name: str, arguments: Sequence[tuple[str, str]], outputs: Sequence[str],
                     results: int, saves: Sequence[str], no_grad: Sequence[str], named: bool,
                     implementations: Mapping[str, Implementation], fake: Callable | None,
                     flops: Callable | None) -> tuple[Callable, Callable]:
    """Register ``<name>_bwd`` and return the forward's ``backward`` and ``setup_context``."""
    types = dict((argument, type_) for type_, argument in arguments)
    types.update(dict.fromkeys(filter(None, outputs), 'Tensor'))
    types.update({f'wants_{argument}': 'bool' for _, argument in arguments})
    names = [argument for _, argument in arguments]
    of_tensors = [key for key in saves if types[key] in ('Tensor', 'Tensor?')]
    constants = [key for key in saves if key not in of_tensors]
    wanted = [key.removeprefix('wants_') for key in constants if key not in names]
    if [*of_tensors, *constants] != [*saves] or [f'wants_{key}' for key in wanted] != \
            constants[len(constants) - len(wanted):]:
        raise ValueError(f'{name}: saves must have tensors first, then others, then wants_')
    differentiable = [(i, argument) for i, (type_, argument) in enumerate(arguments)
                      if type_ in ('Tensor', 'Tensor?') and argument not in no_grad]
    optional = {argument for _, argument in differentiable if types[argument] == 'Tensor?'}
    grads = ['Tensor grad'] if results == 1 else [f'Tensor? grad_{i}' for i in range(results)]
    schema = ', '.join([*grads, *(f'{types[key]} {key}' for key in saves),
                        *['str backend'] * named])
    returned = ', '.join(['Tensor'] * len(differentiable))
    schema = f'({schema}) -> ' + (f'({returned})' if len(differentiable) > 1 else returned)
    # Where the forward finds what the backward gets: (index, whether among the arguments).
    sources = [(names.index(key), True) if key in names else (outputs.index(key), False)
               for key in of_tensors]

    def implement(implementation):
        if implementation.saves or all(is_argument for _, is_argument in sources):
            return implementation.backward
        given = [True] * results + [key not in of_tensors or key in names for key in saves]
        return lambda *args: implementation.backward(*compress(args, given))

    functions = {key: implement(implementation) for key, implementation in implementations.items()}
    single = next(iter(functions.values()))

    def run(*args):
        return functions[args[-1]](*args[:-1]) if named else single(*args)

    def function(*args):
        input_grads = run(*args)
        if optional:  # The schema has no optional results: an absent gradient is an empty tensor.
            empty = args[results].new_empty
            input_grads = tuple([empty(0) if g is None else g for g in input_grads])
        return input_grads

    def like_tensors(*args):
        values = dict(zip(saves, args[results:], strict=False))
        input_grads = tuple(args[results].new_empty(0) if values[key] is None
                            else values[key].new_empty(values[key].shape)
                            for _, key in differentiable)
        return input_grads if len(input_grads) > 1 else input_grads[0]

    bwd_name = f'{name.removesuffix("_fwd")}_bwd'
    call_backward = register(bwd_name, schema, function, fake=fake or like_tensors)

    def formula(*args, out_shape=None, **kwargs):
        values = dict(zip(saves, args[results:], strict=False))
        wants = [values.pop(f'wants_{key}') for key in wanted]
        shapes = {key: value for key, value in values.items() if key in names}
        return (1 + all(wants)) * flops(**shapes) if flops else 0

    _count_flops(bwd_name, formula)
    of_constants = [names.index(key) for key in constants[:len(constants) - len(wanted)]]
    if named:
        of_constants.append(len(names))  # backend follows the arguments
    of_wanted = [names.index(key) for key in wanted]
    of_results = {results + i for i, (_, is_argument) in enumerate(sources) if not is_argument}
    optional_at = [(i, of_tensors.index(key)) for i, key in differentiable if key in optional]
    come_first = [i for i, _ in differentiable] == [*range(len(differentiable))]

    def setup(ctx, inputs, output):
        # Eagerly, what an implementation does not save is not there.
        found = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*[inputs[i] if is_argument else found[i] if i < len(found) else None
                                for i, is_argument in sources])
        ctx.constants = tuple([inputs[i] for i in of_constants])
        ctx.size = len(inputs)

    def backward(ctx, *output_grads):
        saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
        wants, rest = (), ctx.constants
        if of_wanted:
            wants = [ctx.needs_input_grad[i] for i in of_wanted]
            rest = (*rest[:-1], *wants, rest[-1]) if named else (*rest, *wants)
        args = (*output_grads, *saved, *rest)
        if torch.is_grad_enabled() or is_watched(args):
            input_grads = call_backward(*[saved[0].new_empty(0) if arg is None and i in of_results
                                          else arg for i, arg in enumerate(args)])
        else:
            with no_autocast():
                input_grads = run(*args)
        if len(differentiable) == 1:
            input_grads = input_grads,
        if come_first:
            gradients = [*input_grads, *[None] * (ctx.size - len(differentiable))]
        else:
            gradients = [None] * ctx.size
            for (i, _), gradient in zip(differentiable, input_grads, strict=True):
                gradients[i] = gradient
        for i, place in optional_at:
            if saved[place] is None:
                gradients[i] = None
        for i, want in zip(of_wanted, wants, strict=True):
            if not want:
                gradients[i] = None
        return tuple(gradients)

    return backward, setup


# --- registration -------------------------------------------------------------------------------

def register(name: str, schema: str, function: Callable, *, fake: Callable) -> Callable:
    """Register ``function`` as ``torch.ops.vmamba_mm.<name>`` without a backward: for the backward
    of an op that has one of its own. It returns what calls the op."""
    dispatch, run_eagerly = _register(name, schema, function, fake)

    def call(*args):
        return dispatch(*args) if is_watched(args) else run_eagerly(None, *args)

    return call


def _register(name: str, schema: str, function: Callable, fake: Callable,
              backward: Callable | None = None, setup_context: Callable | None = None,
              results: int = 1, run: Callable | None = None) -> tuple[Callable, Callable]:
    """Register ``function`` as ``torch.ops.vmamba_mm.<name>``, for any device.

    Args:
        schema, fake, results, backward, setup_context: as for :func:`define_op`. Without a
            ``backward`` a backward through the op raises.
        run: ``function``, but for results without a gradient that it may leave out. It runs when
            nothing watches.

    Returns:
        What calls the op with positional arguments when :func:`is_watched` says so, and what
        calls the function itself when it does not: ``(wants, *args)``, where ``wants`` is whether
        a gradient is wanted, None to find out. Of ``run`` it gives the first ``results``.
    """
    if torch_private.MISSING:
        return _register_publicly(name, schema, function, fake, backward, setup_context, results,
                                  run is not None)
    library, size = _library(name), len(_parse(schema)[0])
    op, below = (_define(library, n, schema, fake) for n in (name, f'_{name}'))

    def direct(*args):
        with no_autocast():
            return function(*args)

    def direct_run(*args):
        with no_autocast():
            return run(*args)

    def call_below_autograd(*args):
        with below_autograd():
            return below(*args)

    differentiable = functools.partial(_differentiable, name, size, backward, setup_context,
                                       results)
    # What runs eagerly inside a compiled model is not for Dynamo either.
    hidden = torch_private.hide_from_dynamo(functools.wraps(function)(direct))
    with_grad = differentiable(call_below_autograd)
    for key, kernel, kernel_below in (
            ('CompositeExplicitAutograd', hidden, hidden),
            ('Autograd', lambda *args: with_grad(None, *args), torch.library.fallthrough_kernel)):
        library.impl(name, kernel, key)
        library.impl(f'_{name}', kernel_below, key)
    transformable = _transformable(name, size, backward, setup_context, results, direct)

    def dispatch(*args):
        return transformable.apply(*args) if is_transformed() else op(*args)

    return dispatch, differentiable(direct) if run is None else differentiable(direct_run, True)


def _register_publicly(name: str, schema: str, function: Callable, fake: Callable,
                       backward: Callable | None, setup_context: Callable | None, results: int,
                       shorten: bool) -> tuple[Callable, Callable]:
    """:func:`_register` with public names alone."""
    def without_autocast(*args):
        with devices.without_autocast(args[0]):
            return function(*args)

    op = torch.library.custom_op(f'{NAMESPACE}::{name}', without_autocast, mutates_args=(),
                                 schema=schema)
    op.register_fake(fake)
    op.register_vmap(lambda info, in_dims, *args: _loop(op, info.batch_size, in_dims, args))
    op.register_autograd(
        _first_backward(name, len(_parse(schema)[0]), backward, results),
        setup_context=lambda ctx, inputs, output: _prepare(ctx, inputs, output, setup_context,
                                                           results))

    def run_eagerly(wants, *args):
        return _first(op(*args), results) if shorten else op(*args)

    return op, run_eagerly


def _count_flops(name: str, formula: Callable) -> None:
    ops = getattr(torch.ops, NAMESPACE)
    register_flop_formula([getattr(ops, key) for key in (name, f'_{name}') if hasattr(ops, key)]
                          )(formula)


def _define(library: torch.library.Library, name: str, schema: str, fake: Callable) -> Callable:
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _library(name: str) -> torch.library.Library:
    """An empty library for one op. torch's namespace keeps it, for it outlives our modules."""
    libraries = vars(getattr(torch.ops, NAMESPACE)).setdefault('_libraries', {})
    if name in libraries:
        torch_private.destroy_library(libraries.pop(name))
    libraries[name] = torch.library.Library(NAMESPACE, 'FRAGMENT')
    return libraries[name]


def is_watched(args: tuple) -> bool:
    """Whether a compiler, a mode, a profiler or a subclass of tensors wants to see the op."""
    if torch_private.MISSING:
        return True
    if torch.compiler.is_compiling() or is_tracing() or are_transforms_active():
        return True
    if count_dispatch_modes() > 0 or is_profiling():
        return True
    # On meta the fake is all there is to run; a batched backward's gradient is first.
    if isinstance(args[0], Tensor) and (args[0].is_meta or is_legacy_batched(args[0])):
        return True
    return not _PLAIN.issuperset(map(type, args)) and not all(
        _PLAIN.issuperset(map(type, arg)) if type(arg) is list else type(arg) in _PLAIN
        for arg in args)


def is_transformed() -> bool:
    """Whether torch.func transforms are at work, such as grad and vmap, and no compiler is."""
    return not torch.compiler.is_compiling() and are_transforms_active()


def _transformable(name: str, size: int, backward: Callable | None,
                   setup_context: Callable | None, results: int, function: Callable
                   ) -> type[torch.autograd.Function]:
    """``function`` with the op's backward, in the form that torch.func's transforms ask for.

    vmap runs it for one sample after the other: kernels know no further dimension of batches.
    """
    def setup(ctx, inputs, output):
        _prepare(ctx, inputs, output, setup_context, results)

    def vmap(info, in_dims, *args):
        return _loop(node.apply, info.batch_size, in_dims, args)

    def jvp(ctx, *tangents):
        raise NotImplementedError(f'{NAMESPACE}::{name} has no forward-mode derivative: take one '
                                  'by reverse mode, such as torch.func.grad, vjp or jacrev')

    def unwrapped(ctx, *grads):
        return backward(_Unwrapped(ctx), *grads)

    node = _make_node(name, size, backward and unwrapped, results,
                      forward=lambda *args: function(*args), setup_context=setup, vmap=vmap,
                      jvp=jvp)
    return node


def _loop(function: Callable, batch: int, in_dims: tuple, args: tuple) -> tuple:
    """``function`` of each sample of batched arguments, for ``vmap``."""
    samples = [function(*_sample(args, in_dims, i)) for i in range(batch)]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])


def _sample(args: tuple, dims: tuple, index: int) -> tuple:
    """Sample ``index`` of batched arguments, of which ``dims`` tells where the batch is."""
    # A copy, since a part of memory that an op has laid out for itself can begin anywhere.
    return tuple(_sample(arg, dim, index) if isinstance(arg, list | tuple)
                 else arg if dim is None else arg.select(dim, index).clone()
                 for arg, dim in zip(args, dims, strict=True))


class _Unwrapped:
    """A backward's ``ctx`` without the wrappers of transforms that have ended: what vjp returns is
    called after it."""

    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else unwrap_if_dead(t) for t in self._ctx.saved_tensors)


def _prepare(ctx, inputs: tuple, output, setup_context: Callable | None, results: int) -> None:
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple) and len(output) > results:
        ctx.mark_non_differentiable(*output[results:])
    if setup_context is not None:
        setup_context(ctx, inputs, output)


def _first_backward(name: str, size: int, backward: Callable | None, results: int) -> Callable:
    def first_backward(ctx, *grads):
        if backward is None:
            raise RuntimeError(f'{NAMESPACE}::{name} has no backward')
        grads = grads[:results]
        for grad in grads:
            if grad is not None:
                return backward(ctx, *grads)
        return (None,) * size

    return first_backward


def _make_node(name: str, size: int, backward: Callable | None, results: int,
               **methods: Callable) -> type[torch.autograd.Function]:
    methods['backward'] = _first_backward(name, size, backward, results)
    return type(name, (torch.autograd.Function,),
                {key: staticmethod(method) for key, method in methods.items()})


def _differentiable(name: str, size: int, backward: Callable | None,
                    setup_context: Callable | None, results: int, function: Callable,
                    shorten: bool = False) -> Callable:
    """``function`` with the op's backward, in the form that costs little: ``(wants, *args)``. With
    ``shorten`` it gives the first ``results`` alone: autograd need not know of the others."""
    def forward(ctx, *args):
        output = function(*args)
        if backward is not None:
            _prepare(ctx, args, output, setup_context, results)
        return _first(output, results) if shorten else output

    node = _make_node(name, size, backward, results, forward=forward)

    def call(wants, *args):
        if wants is None:
            wants = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if wants and torch.is_grad_enabled():
            return node.apply(*args)
        output = function(*args)
        return _first(output, results) if shorten else output

    return call


def _first(output: Tensor | tuple, results: int) -> Tensor | tuple:
    if not isinstance(output, tuple):
        return output
    return output[0] if results == 1 else output[:results]
