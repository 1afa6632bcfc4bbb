"""How an op is registered with torch, and what chooses an implementation and runs it in a call.

A call in eager mode goes past torch's dispatcher unless something watches what it does: small maps
would wait for it. ``torch.library.custom_op`` does the same work at two to three times the time:
per call it flattens arguments, builds key sets and compares every result with every input. It is
what runs where torch lacks a name of :mod:`vmamba_mm.ops.core.torch_private`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba_mm.ops.core import backends as devices
from vmamba_mm.ops.core import forms, torch_private
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


def make_run(implementations: Mapping[str, Implementation], size: int, named: bool) -> Callable:
    """What runs the implementation that the arguments name, or the only one.

    Args:
        size: arguments before ``backend`` and ``save``.
        named: whether there is an argument ``backend``.
    """
    if not named:
        return next(iter(implementations.values())).forward

    def run(*args):
        chosen = implementations[args[size]]
        if chosen.saves:
            return chosen.forward(*args[:size], *args[size + 1:])
        return chosen.forward(*args[:size])

    return run


def make_call(name: str, reference: Callable, implementations: Mapping[str, Implementation],
              dispatch: Callable, run_eagerly: Callable, *, tensors: tuple[int, ...], named: bool,
              saving: bool, results: int, is_single: bool) -> Callable:
    """What calls an op, and decides once per call which implementation runs.

    Args:
        name, reference, implementations, results: as of
            :func:`vmamba_mm.ops.core.define_op.define_op`.
        dispatch, run_eagerly: of :func:`register_op`.
        tensors: where the arguments stand that have a gradient.
        named, saving: whether there are the arguments ``backend`` and ``save``.
        is_single: whether the schema has one result.
    """
    order = tuple((key, implementation.why_not, implementation.saves)
                  for key, implementation in implementations.items())

    def call(*args, backend=None, otherwise=reference):
        if forms.active is not None and name in forms.active:
            return forms.active[name](*args)
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


def parse(schema: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (type, name) of each argument, and the names of the results, empty for none."""
    inputs, _, returned = schema.removeprefix('(').partition(') -> ')
    arguments = [tuple(argument.split()) for argument in inputs.split(', ')]
    results = returned.removeprefix('(').removesuffix(')').split(', ')
    return arguments, [result.partition(' ')[2] for result in results]


# --- registration -------------------------------------------------------------------------------

def register(name: str, schema: str, function: Callable, *, fake: Callable) -> Callable:
    """Register ``function`` as ``torch.ops.vmamba_mm.<name>`` without a backward: for the backward
    of an op that has one of its own. It returns what calls the op."""
    dispatch, run_eagerly = register_op(name, schema, function, fake)

    def call(*args):
        return dispatch(*args) if is_watched(args) else run_eagerly(None, *args)

    return call


def register_op(name: str, schema: str, function: Callable, fake: Callable,
              backward: Callable | None = None, setup_context: Callable | None = None,
              results: int = 1, run: Callable | None = None) -> tuple[Callable, Callable]:
    """Register ``function`` as ``torch.ops.vmamba_mm.<name>``, for any device.

    Args:
        schema, fake, results, backward, setup_context: as of
            :func:`vmamba_mm.ops.core.define_op.define_op`. Without a ``backward`` a backward
            through the op raises.
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
    library, size = _library(name), len(parse(schema)[0])
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
        _first_backward(name, len(parse(schema)[0]), backward, results),
        setup_context=lambda ctx, inputs, output: _prepare(ctx, inputs, output, setup_context,
                                                           results))

    def run_eagerly(wants, *args):
        return _first(op(*args), results) if shorten else op(*args)

    return op, run_eagerly


def count_flops(name: str, formula: Callable) -> None:
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
        if backward is None:
            return _first(output, results) if shorten else output
        if not shorten:
            _prepare(ctx, args, output, setup_context, results)
            return output
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, args, output)
        if isinstance(output, tuple):
            return output[0] if results == 1 else output[:results]
        return output

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
