"""``wkv6`` and ``wkv7`` by the kernels of flash-linear-attention (`fla-core`, the extra `rwkv`).

Its functions change from version to version, take what they do not know (``**kwargs``) and have
conventions that numbers alone tell: the logarithm of decays in place of w, a scale, the layout of
states. So the arguments are looked for by name, and the first call for a device, dtype and sizes is
compared with the reference, results, final state and every gradient. Where either fails, an error
says so; nothing else takes over.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.ops.core.backends import KERNEL_DEVICES, without_autocast
from vmamba_mm.ops.matrix_wkv import reference

#: Module and name of a function, and the arguments that are passed.
_FUNCTIONS = {
    'wkv6': ('fla.ops.rwkv6', 'chunk_rwkv6', ('r', 'k', 'v', 'w', 'u')),
    'wkv7': ('fla.ops.rwkv7', 'chunk_rwkv7', ('r', 'w', 'k', 'v', 'a', 'b'))}
_OPTIONS = 'scale', 'initial_state', 'output_final_state'
_REFERENCES = dict(wkv6=reference.forward_wkv6, wkv7=reference.forward_wkv7)
#: Of the comparison, relative in the 2-norm. Another convention is off by far more, and fp32 may be
#: multiplied as TF32.
_LIMITS = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_HINT = "install another version of the package fla-core, or pass backend='chunked'"


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec('fla') is not None


def is_default(r: Tensor) -> bool:
    """Whether its kernels run where nobody has chosen: fp16 or bf16 on a GPU, in eager mode."""
    return (r.device.type in KERNEL_DEVICES and r.dtype in (torch.float16, torch.bfloat16)
            and not torch.compiler.is_compiling() and is_installed())


def wkv6(r, k, v, w, u, initial_state, return_final_state) -> tuple[Tensor, Tensor | None]:
    """Shapes as in :func:`vmamba_mm.ops.wkv6`."""
    return _run('wkv6', (r, k, v, w, u), initial_state, return_final_state)


def wkv7(r, w, k, v, a, b, initial_state, return_final_state) -> tuple[Tensor, Tensor | None]:
    """Shapes as in :func:`vmamba_mm.ops.wkv7`."""
    return _run('wkv7', (r, w, k, v, a, b), initial_state, return_final_state)


@torch.compiler.disable  # as its functions are: a compiled graph breaks here
def _run(op, tensors, initial_state, return_final_state):
    r, v = tensors[0], tensors[_FUNCTIONS[op][2].index('v')]
    if r.dtype not in _LIMITS:
        raise ValueError(f"backend='fla' does not take these inputs: they are {r.dtype}, it takes "
                         "fp32, fp16 and bf16; choose None or 'chunked'")
    if not len(r):  # kernels are not started for no sample
        return _REFERENCES[op](*tensors, initial_state, return_final_state)
    function = _find(op)
    _verify(op, function, r.device, r.dtype, r.shape[3], v.shape[3])
    return _call(op, function, tensors, initial_state, return_final_state)


def _call(op, function, tensors, initial_state, return_final_state):
    names, r = _FUNCTIONS[op][2], tensors[0]
    given = {name: -t.float().exp() if name == 'w' else t.to(r.dtype)
             for name, t in zip(names, tensors, strict=True)}
    if initial_state is not None:
        initial_state = initial_state.float()
    with without_autocast(r):
        y, state = function(**given, scale=1.0, initial_state=initial_state,
                            output_final_state=return_final_state)
    return y.to(r.dtype), state


@functools.cache
def _find(op: str) -> Callable:
    module, name, arguments = _FUNCTIONS[op]
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as err:
        raise UserError(f"backend='fla' needs {module}.{name} of flash-linear-attention, which is "
                        f'not there ({err}); {_HINT}') from err
    known = inspect.signature(function).parameters
    missing = [key for key in (*arguments, *_OPTIONS) if key not in known]
    if missing:
        raise UserError(f'{module}.{name} of the installed flash-linear-attention has no argument '
                        f'{", ".join(map(repr, missing))}; {_HINT}')
    return function


@functools.cache
def _verify(op: str, function: Callable, device: torch.device, dtype: torch.dtype, size: int,
            dim: int) -> None:
    """Raise UserError unless the function calculates the op, on two sequences of 70 tokens."""
    length, heads = 70, 2
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng)

    names = _FUNCTIONS[op][2]
    shapes = dict(v=(2, length, heads, dim), u=(heads, size), state=(2, heads, size, dim))
    inputs = {name: randn(*shapes.get(name, (2, length, heads, size)))
              for name in (*names, 'state')}
    # As of a model: slow and fast decays, and a key of length 1 that is removed in part.
    inputs['w'] = inputs['w'] - 1.5
    if op == 'wkv7':
        inputs['w'] = inputs['w'].clamp_max(-0.5)
        inputs['a'] = torch.nn.functional.normalize(inputs['a'], dim=-1)
        inputs['b'] = -inputs['a'] * inputs['b'].sigmoid()
    rounded = {name: t if name == 'state' else t.to(dtype) for name, t in inputs.items()}

    def run(function, leaves):
        *tensors, state = leaves
        y, final = function(*tensors, state, True)
        seeds = torch.Generator().manual_seed(1)
        given = [torch.randn(t.shape, generator=seeds).to(t) for t in (y, final)]
        return y, final, *torch.autograd.grad((y, final), leaves, given)

    def calculate(*args):
        return _call(op, function, args[:-2], *args[-2:])

    with torch.enable_grad(), torch.inference_mode(False):
        found = run(calculate, [t.to(device, copy=True).requires_grad_() for t in rounded.values()])
        expected = run(_REFERENCES[op], [t.double().requires_grad_() for t in rounded.values()])
    labels = ('y', 'the final state', *(f'the gradient by {name}' for name in inputs))
    for label, one, right in zip(labels, found, expected, strict=True):
        error = ((one.detach().cpu().double() - right).norm() / right.norm()).item()
        if not error <= _LIMITS[dtype]:
            version = getattr(importlib.import_module('fla'), '__version__', 'unknown')
            raise UserError(f'{_FUNCTIONS[op][1]} of flash-linear-attention {version} does not '
                            f'calculate {op}: {label} is off by {error:.2g} ({dtype}, heads of '
                            f'{size} channels, on {device}); {_HINT}')
