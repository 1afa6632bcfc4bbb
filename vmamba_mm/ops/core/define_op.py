"""How an op is defined: one call gives it everything that PyTorch and this package ask of an op."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter

import torch
from torch import Tensor

from vmamba_mm.ops.core.calls import (
    Implementation,
    count_flops,
    is_watched,
    make_call,
    make_run,
    parse,
    register,
    register_op,
)
from vmamba_mm.ops.core.torch_private import no_autocast

#: The definitions by name, for tests and tables.
OPS: dict[str, 'Op'] = {}


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
    arguments, outputs = parse(schema)
    names = [argument for _, argument in arguments]
    named, saving = 'backend' in names, 'save' in names
    size = len(names) - named - saving
    if names[size:] != ['backend'] * named + ['save'] * saving:
        raise ValueError(f'{name}: backend and save must come last, in this order: {schema}')
    if not callable(reference):
        raise ValueError(f'{name}: an op needs a reference, got {reference!r}')
    if not implementations or len(implementations) > 1 and not named:
        raise ValueError(f'{name}: several implementations need an argument backend: {schema}')

    run = make_run(implementations, size, named)

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
    dispatch, run_eagerly = register_op(name, schema, forward, fake, backward, setup_context,
                                      results, run)

    def formula(*args, out_shape=None, **kwargs):
        return flops(**dict(zip(names[:size], args, strict=False))) if flops else 0

    count_flops(name, formula)
    tensors = tuple(i for i, (type_, argument) in enumerate(arguments[:size])
                    if type_ in ('Tensor', 'Tensor?') and argument not in no_grad.split())
    call = make_call(name, reference, implementations, dispatch, run_eagerly, tensors=tensors,
                     named=named, saving=saving, results=results, is_single=len(outputs) == 1)
    call.__name__ = call.__qualname__ = name
    OPS[name] = Op(name, schema, reference, implementations, call)
    return call


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
        function = implementation.backward
        return lambda *args: function(*compress(args, given))

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

    count_flops(bwd_name, formula)
    of_constants = [names.index(key) for key in constants[:len(constants) - len(wanted)]]
    if named:
        of_constants.append(len(names))  # backend follows the arguments
    of_wanted = [names.index(key) for key in wanted]
    of_results = {results + i for i, (_, is_argument) in enumerate(sources) if not is_argument}
    optional_at = [(i, of_tensors.index(key)) for i, key in differentiable if key in optional]
    come_first = [i for i, _ in differentiable] == [*range(len(differentiable))]

    # Where arguments come first, they are taken at once.
    of_arguments = [i for i, is_argument in sources if is_argument]
    in_order = all(is_argument for _, is_argument in sources[:len(of_arguments)])
    take_arguments, take_constants = _take(of_arguments), _take(of_constants)
    of_outputs = [i for i, is_argument in sources if not is_argument]

    def setup(ctx, inputs, output):
        # Eagerly, what an implementation does not save is not there.
        found = output if isinstance(output, tuple) else (output,)
        if in_order:
            ctx.save_for_backward(*take_arguments(inputs), *[
                found[i] if i < len(found) else None for i in of_outputs])
        else:
            ctx.save_for_backward(*[
                inputs[i] if is_argument else found[i] if i < len(found) else None
                for i, is_argument in sources])
        ctx.constants = take_constants(inputs)
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
                input_grads = functions[args[-1]](*args[:-1]) if named else single(*args)
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


def _take(indices: Sequence[int]) -> Callable[[tuple], tuple]:
    """What takes the items with these indices from a tuple."""
    if len(indices) > 1:
        return itemgetter(*indices)  # a call of C
    return lambda values: tuple([values[i] for i in indices])
