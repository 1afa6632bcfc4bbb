"""Parameters rounded to half precision by the CUDA kernel ``cast.cu``."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES

_MOST = 6  # parameters of a launch
FIELDS = 'P' * (_MOST + 1) + 'i' * (3 * _MOST + 1)  # of the kernels' struct


def cast_instance(type_: str) -> Instance:
    return Instance('fused/cast.cu', f'cast<{type_}>', FIELDS)


def plan_cast(sizes: Sequence[int], dtypes: Sequence[torch.dtype]
              ) -> tuple[list[int], int, Callable[..., tuple[int, ...]]]:
    """Where each of at most six tensors of ``sizes`` elements begins in the result, and where that
    ends; blocks of 256 threads for it; the kernels' fields by the addresses of them and the
    result."""
    starts = [0, *accumulate(-(-size // 8) * 8 for size in sizes)]
    absent = (0,) * (_MOST - len(sizes))
    rest = (*starts, *[starts[-1]] * len(absent), *sizes, *absent, *[CODES[d] for d in dtypes],
            *absent)
    return (starts, min(1024, -(-starts[-1] // 2048)),
            lambda *addresses: (*addresses[:-1], *absent, addresses[-1], *rest))


@cached
def cast_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                dtypes: tuple[torch.dtype, ...]) -> tuple[list[int], Callable[..., None]]:
    """Where each of at most six tensors begins in one of ``dtype``, where that ends, and what
    rounds them into it. Of addresses: them, the result."""
    starts, blocks, fields = plan_cast(sizes, dtypes)
    launch = kernel(index, cast_instance, TYPES[dtype]).bind((blocks, 1, 1), (256, 1, 1))
    return starts, lambda *addresses: launch(*fields(*addresses))


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each parameter in ``dtype``, without gaps; at most six, rounded by one launch."""
    parameters = [p.contiguous() for p in parameters]
    if all(p.dtype == dtype for p in parameters):
        return parameters
    starts, launch = cast_launch(parameters[0].get_device(), dtype,
                                 tuple(p.numel() for p in parameters),
                                 tuple(p.dtype for p in parameters))
    buffer = parameters[0].new_empty(starts[-1], dtype=dtype)
    launch(*[p.data_ptr() for p in parameters], buffer.data_ptr())
    return [buffer.as_strided(p.shape, p.stride(), start)
            for p, start in zip(parameters, starts, strict=False)]
