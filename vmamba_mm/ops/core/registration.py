"""How an op is registered with torch.library so that calling it eagerly costs little.

``torch.library.custom_op`` with ``register_autograd`` does the same work at two to three times the
time: per call it flattens arguments, builds key sets and compares every result with every input.
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = 'vmamba_mm'
_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, float, str, list, torch.dtype}


def register(name: str, *, fake: Callable, backward: Callable | None = None,
             setup_context: Callable | None = None, results: int = 1
             ) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as ``torch.ops.vmamba_mm.<name>``, for any device.

    The function has annotations that ``torch.library.infer_schema`` reads and positional arguments
    without defaults; its results share memory with nothing (``opcheck`` tells, a call does not).
    It runs below autograd, with autocast off: an op has its own dtype policy. There, modes and
    compiled graphs see ``_<name>``, of which autograd knows nothing: a compiled model would wait
    for Python twice otherwise.

    Args:
        name: of the op; a name registered before, as by a module imported again, is replaced.
        fake: results from the same arguments, of which only metadata counts.
        backward: ``(ctx, *grads) -> gradients``, one for each argument, from those by the first
            ``results`` results, None for a result that was not used (never all); the other
            results are not differentiable. It should call ops. Without it a backward through the
            op raises.
        setup_context: ``(ctx, inputs, output)``, as for ``torch.autograd.Function``.
        results: how many results have a gradient.

    Returns:
        What calls the op with positional arguments: the function itself where nothing watches or
        transforms what the dispatcher does, which a small map would wait for.
    """
    def decorate(function: Callable) -> Callable:
        library = _library(name)
        schema = torch.library.infer_schema(function, mutates_args=())
        op, below = (_define(library, n, schema, fake) for n in (name, f'_{name}'))

        def direct(*args):
            with torch._C._DisableAutocast():
                return function(*args)

        def below_autograd(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return below(*args)

        differentiable = functools.partial(_differentiable, name, len(op._schema.arguments),
                                           backward, setup_context, results)
        direct_with_grad = differentiable(direct)
        # What runs eagerly inside a compiled model is not for Dynamo either.
        hidden = torch._disable_dynamo(functools.wraps(function)(direct))
        for key, kernel, kernel_below in (
                ('CompositeExplicitAutograd', hidden, hidden),
                ('Autograd', differentiable(below_autograd), torch.library.fallthrough_kernel)):
            library.impl(name, kernel, key)
            library.impl(f'_{name}', kernel_below, key)

        transformable = _transformable(name, len(op._schema.arguments), backward, setup_context,
                                       results, direct)

        @functools.wraps(function)
        def call(*args):
            if not _is_watched(args):
                return direct_with_grad(*args)
            if _is_transformed():
                return transformable.apply(*args)
            return op(*args)

        return call

    return decorate


def flop_formula(*names: str) -> Callable[[Callable], Callable]:
    """``register_flop_formula`` for ops of :func:`register`."""
    ops = getattr(torch.ops, NAMESPACE)
    return register_flop_formula([getattr(ops, n) for name in names for n in (name, f'_{name}')])


def _define(library: torch.library.Library, name: str, schema: str, fake: Callable
            ) -> torch._ops.OpOverload:
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _library(name: str) -> torch.library.Library:
    """An empty library for one op. torch's namespace keeps it, for it outlives our modules."""
    libraries = vars(getattr(torch.ops, NAMESPACE)).setdefault('_libraries', {})
    if name in libraries:
        libraries.pop(name)._destroy()
    libraries[name] = torch.library.Library(NAMESPACE, 'FRAGMENT')
    return libraries[name]


def _is_watched(args: tuple) -> bool:
    """Whether a compiler, a mode, a profiler or a subclass of tensors wants to see the op."""
    return (torch.compiler.is_compiling() or torch._C._is_tracing() or _is_transformed()
            # On meta the fake is all there is to run; a batched backward's gradient is first.
            or isinstance(args[0], Tensor) and (
                args[0].is_meta or torch._C._functorch.is_legacy_batchedtensor(args[0]))
            or torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
            or not _PLAIN.issuperset(map(type, args))
            or any(type(arg) is list and not _PLAIN.issuperset(map(type, arg)) for arg in args))


def _is_transformed() -> bool:
    """Whether torch.func transforms are at work, such as grad and vmap, and no compiler is."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _transformable(name: str, num_arguments: int, backward: Callable | None,
                   setup_context: Callable | None, results: int, function: Callable
                   ) -> type[torch.autograd.Function]:
    """``function`` with the op's backward, in the form that torch.func's transforms ask for.

    vmap runs it for one sample after the other: kernels know no further dimension of batches.
    """
    def setup(ctx, inputs, output):
        _prepare(ctx, inputs, output, setup_context, results)

    def loop(info, in_dims, *args):
        parts = [node.apply(*_sample(args, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        return tuple(map(torch.stack, zip(*parts, strict=True))), (0,) * len(parts[0])

    def jvp(ctx, *tangents):
        raise NotImplementedError(f'{NAMESPACE}::{name} has no forward-mode derivative: take one '
                                  'by reverse mode, such as torch.func.grad, vjp or jacrev')

    def unwrapped(ctx, *grads):
        return backward(_Unwrapped(ctx), *grads)

    node = _make_node(name, num_arguments, backward and unwrapped, results,
                      forward=lambda *args: function(*args), setup_context=setup, vmap=loop,
                      jvp=jvp)
    return node


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
        return tuple(None if t is None else torch._C._functorch.unwrap_if_dead(t)
                     for t in self._ctx.saved_tensors)


def _prepare(ctx, inputs: tuple, output, setup_context: Callable | None, results: int) -> None:
    ctx.set_materialize_grads(False)
    if isinstance(output, tuple) and len(output) > results:
        ctx.mark_non_differentiable(*output[results:])
    if setup_context is not None:
        setup_context(ctx, inputs, output)


def _make_node(name: str, num_arguments: int, backward: Callable | None, results: int,
               **methods: Callable) -> type[torch.autograd.Function]:
    def first_backward(ctx, *grads):
        if backward is None:
            raise RuntimeError(f'{NAMESPACE}::{name} has no backward')
        grads = grads[:results]
        if all(grad is None for grad in grads):
            return (None,) * num_arguments
        return backward(ctx, *grads)

    methods['backward'] = first_backward
    return type(name, (torch.autograd.Function,),
                {key: staticmethod(method) for key, method in methods.items()})


def _differentiable(name: str, num_arguments: int, backward: Callable | None,
                    setup_context: Callable | None, results: int, function: Callable) -> Callable:
    """``function`` with the op's backward, in the form that costs little."""
    def forward(ctx, *args):
        output = function(*args)
        if backward is not None:
            _prepare(ctx, args, output, setup_context, results)
        return output

    node = _make_node(name, num_arguments, backward, results, forward=forward)

    def call(*args):
        if torch.is_grad_enabled() and any(
                isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return node.apply(*args)
        return function(*args)

    return call
