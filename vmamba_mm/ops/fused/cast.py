"""Parameters rounded to half precision by the CUDA kernel ``cast.cu``."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, kernel

_MOST = 7  # MOST in cast.cuh: parameters of a launch


def cast_instance(type_: str) -> Instance:
    return Instance('fused/cast.cu', f'cast<{type_}>')


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {cast_instance('Half'): 75, cast_instance('BFloat'): 80}


class CastPlan(NamedTuple):
    """The layout for rounding at most seven tensors into one.

    ``starts``: where each begins in the result, and where that ends, in elements. ``blocks`` of 256
    threads. ``fields``: numbers for the kernels' struct Cast. ``absent``: addresses for the tensors
    that there are not.
    """
    starts: list[int]
    blocks: int
    fields: dict[str, tuple[int, ...]]
    absent: tuple[int, ...]


def plan_cast(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> CastPlan:
    """The plan for tensors of so many elements and these dtypes."""
    starts = [0, *accumulate(-(-size // 8) * 8 for size in sizes)]
    absent = (0,) * (_MOST - len(sizes))
    fields = dict(starts=(*starts, *[starts[-1]] * len(absent)), sizes=(*sizes, *absent),
                  types=(*[CODES[d] for d in dtypes], *absent))
    return CastPlan(starts, min(1024, -(-starts[-1] // 2048)), fields, absent)


@cached
def cast_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                dtypes: tuple[torch.dtype, ...]) -> tuple[list[int], Callable[..., None]]:
    """The ``starts`` of the plan, and what rounds the tensors into one of ``dtype``; it takes their
    addresses (a tuple) and that of the result."""
    plan = plan_cast(sizes, dtypes)
    launch = kernel(index, cast_instance, TYPES[dtype]).bind(
        (plan.blocks, 1, 1), (256, 1, 1), **plan.fields)

    def launch_cast(sources, to):
        launch(sources=(*sources, *plan.absent), to=to)

    return plan.starts, launch_cast


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each parameter in ``dtype``, without gaps; at most seven, rounded by one launch."""
    parameters = [p.contiguous() for p in parameters]
    if all(p.dtype == dtype for p in parameters):
        return parameters
    starts, launch = cast_launch(parameters[0].get_device(), dtype,
                                 tuple(p.numel() for p in parameters),
                                 tuple(p.dtype for p in parameters))
    buffer = parameters[0].new_empty(starts[-1], dtype=dtype)
    launch([p.data_ptr() for p in parameters], buffer.data_ptr())
    return [buffer.as_strided(p.shape, p.stride(), start)
            for p, start in zip(parameters, starts, strict=False)]
