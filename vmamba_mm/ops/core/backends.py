"""The implementations of ops by name, and what they share: dtypes, autocast, gradients."""

import contextlib
import functools
from typing import Literal

import torch
from torch import Tensor

from vmamba_mm.ops.core import forms

#: 'reference' is the specification (a loop over L), 'chunked' the parallel plain-PyTorch one,
#: 'cuda' the kernels for NVIDIA GPUs, 'triton' those for any GPU that Triton knows.
BACKENDS = ('reference', 'chunked', 'cuda', 'triton')
#: Types of the devices that kernels run on. A tensor elsewhere is not asked about any of them.
KERNEL_DEVICES = ('cuda', 'xpu')
Backend = Literal['reference', 'chunked', 'cuda', 'triton']


def runs_kernels(x: Tensor) -> bool:
    """Whether ``x`` is where kernels may run; not what torch.fx traces with."""
    return isinstance(x, Tensor) and x.device.type in KERNEL_DEVICES


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast rounds ``x`` to before a matrix product, None without autocast."""
    device = x.device.type
    if (device in ('cpu', 'cuda') or _has_autocast(device)) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    return _is_autocast_available(device)


_is_autocast_available = functools.cache(torch.amp.is_autocast_available)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast is off in this context, on the device of ``x``. A graph for another runtime has no
    autocast and no such context."""
    device = x.device.type
    return (torch.autocast(device, enabled=False)
            if forms.active is None and _has_autocast(device) else contextlib.nullcontext())


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether an op has to keep what its backward needs.

    ``torch.jit.trace`` checks what it has recorded by recording it again without gradients: both
    must be the same, so there the mode does not count.
    """
    return ((torch.is_grad_enabled() or torch.jit.is_tracing())
            and any(t is not None and t.requires_grad for t in tensors))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums: fp32 for fp16, bf16 and fp32 input, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
