"""How an op is registered with torch.library so that calling it eagerly costs little.

``torch.library.custom_op`` with ``register_autograd`` does the same work at two to three times the
time: per call it flattens arguments, builds key sets and compares every result with every input.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = 'vmamba_mm'


def register(name: str, *, fake: Callable, backward: Callable | None = None,
             setup_context: Callable | None = None) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as ``torch.ops.vmamba_mm.<name>``, for any device.

    The function has annotations that ``torch.library.infer_schema`` reads and positional arguments
    without defaults; its results share memory with nothing (``opcheck`` tells, a call does not).
    It runs below autograd, with autocast off: an op has its own dtype policy.

    Args:
        name: of the op; a name registered before, as by a module imported again, is replaced.
        fake: results from the same arguments, of which only metadata counts.
        backward: ``(ctx, grad) -> gradients``, one for each argument, from the gradient by the
            first result, never None; the other results are not differentiable. It should call
            ops. Without it a backward through the op raises.
        setup_context: ``(ctx, inputs, output)``, as for ``torch.autograd.Function``.

    Returns:
        What calls the op with positional arguments: in eager mode without what the dispatcher does
        above autograd.
    """
    def decorate(function: Callable) -> Callable:
        library = _library(name)
        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(getattr(torch.ops, NAMESPACE), name).default

        # What runs eagerly inside a compiled model is not for Dynamo either.
        @torch._disable_dynamo
        @functools.wraps(function)
        def kernel(*args):
            with torch._C._DisableAutocast():
                return function(*args)

        through_autograd = _differentiable(op, name, backward, setup_context)
        library.impl(name, kernel, 'CompositeExplicitAutograd')
        library.impl(name, through_autograd, 'Autograd')
        torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=library)

        @functools.wraps(function)
        def call(*args):
            # The dispatcher would come to the same, later; tracers and transforms sit above it.
            if (torch.compiler.is_compiling() or torch._C._is_tracing()
                    or torch._C._are_functorch_transforms_active()):
                return op(*args)
            return through_autograd(*args)

        return call

    return decorate


def _library(name: str) -> torch.library.Library:
    """An empty library for one op. torch's namespace keeps it, for it outlives our modules."""
    libraries = vars(getattr(torch.ops, NAMESPACE)).setdefault('_libraries', {})
    if name in libraries:
        libraries.pop(name)._destroy()
    libraries[name] = torch.library.Library(NAMESPACE, 'FRAGMENT')
    return libraries[name]


def _differentiable(op, name: str, backward: Callable | None, setup_context: Callable | None
                    ) -> Callable:
    """The kernel of the Autograd key."""
    num_arguments = len(op._schema.arguments)
    has_others = len(op._schema.returns) > 1

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        if backward is not None:
            ctx.set_materialize_grads(False)
            if has_others:
                ctx.mark_non_differentiable(*output[1:])
            if setup_context is not None:
                setup_context(ctx, args, output)
        return output

    def first_backward(ctx, grad, *_):
        if backward is None:
            raise RuntimeError(f'{NAMESPACE}::{name} has no backward')
        return (None,) * num_arguments if grad is None else backward(ctx, grad)

    node = type(name, (torch.autograd.Function,), {
        'forward': staticmethod(forward), 'backward': staticmethod(first_backward)})

    def kernel(*args):
        if torch.is_grad_enabled() and any(
                isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return node.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel
