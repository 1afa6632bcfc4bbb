"""Which implementation of an op runs: the only place that decides."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

#: 'reference' is the specification (a loop over L), 'chunked' the parallel plain-PyTorch one,
#: 'cuda' the kernels for NVIDIA GPUs, 'triton' those for any GPU that Triton knows.
BACKENDS = ('reference', 'chunked', 'cuda', 'triton')
Backend = Literal['reference', 'chunked', 'cuda', 'triton']


def resolve_backend(backend: str | None, **why_not: Callable[[], str | None]) -> str:
    """Name of the implementation to run.

    Args:
        backend: a name; None for the first of ``why_not`` that takes the inputs, else 'chunked'.
        why_not: for each implementation that is choosy, in order of preference: what keeps it from
            taking these inputs, None if nothing does.

    Raises:
        ValueError: if ``backend`` does not exist or does not take these inputs.
    """
    if backend is None:
        for name, reason in why_not.items():  # Dynamo of torch 2.6 cannot trace next(..., default)
            if reason() is None:
                return name
        return 'chunked'
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} does not exist; choose None or one of {BACKENDS}')
    reason = why_not[backend]() if backend in why_not else None
    if reason is not None:
        raise ValueError(f'backend={backend!r} does not take these inputs: {reason}; choose None '
                         "or 'chunked'")
    return backend


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds ``x`` to before a matrix product, None without autocast."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    return _asked(device)


_asked = functools.cache(torch.amp.is_autocast_available)


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
