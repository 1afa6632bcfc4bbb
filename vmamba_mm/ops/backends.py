"""Which implementation of an op runs: the only place that decides."""

from typing import Literal

import torch

#: 'reference' is the specification (a loop over L), 'chunked' the parallel plain-PyTorch one,
#: 'cuda' the kernels for NVIDIA GPUs, which some ops have for some inputs.
BACKENDS = ('reference', 'chunked', 'cuda')
Backend = Literal['reference', 'chunked', 'cuda']


def resolve_backend(backend: str | None, why_not_cuda: str | None) -> str:
    """Name of the implementation to run.

    Args:
        backend: a name; None for 'cuda' where it takes the inputs, else 'chunked'.
        why_not_cuda: what keeps the op's kernels from taking these inputs, None if nothing does.

    Raises:
        ValueError: if ``backend`` does not exist, or is 'cuda' for inputs that it does not take.
    """
    if backend is None:
        return 'cuda' if why_not_cuda is None else 'chunked'
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} does not exist; choose None or one of {BACKENDS}')
    if backend == 'cuda' and why_not_cuda is not None:
        raise ValueError(f"backend='cuda' does not take these inputs: {why_not_cuda}; choose None "
                         "or 'chunked'")
    return backend


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums: fp32 for fp16, bf16 and fp32 input, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
