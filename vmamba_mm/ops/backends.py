"""Which implementation of an op runs: the only place that decides, or that would probe for one."""

from typing import Literal

import torch

#: 'reference' is the specification (a loop over L), 'chunked' the parallel plain-PyTorch one.
BACKENDS = ('reference', 'chunked')
Backend = Literal['reference', 'chunked']


def resolve_backend(backend: str | None) -> str:
    """Name of the implementation to run; ``None`` takes the fastest there is for the device.

    Today that is 'chunked' on every device. A named backend that does not exist raises.

    Raises:
        ValueError: if ``backend`` is not ``None`` or one of :data:`BACKENDS`.
    """
    if backend is None:
        return 'chunked'
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} does not exist; choose None or one of {BACKENDS}')
    return backend


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums: fp32 for fp16, bf16 and fp32 input, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
