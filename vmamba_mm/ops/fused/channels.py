"""What the kernels share that work on maps with the channels last."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, Instance, cached, kernel, pointer
from vmamba_mm.ops.scan_kernels import cuda as scans

WIDEST = 4096  # channels
_MOST_JOBS = 6  # MOST in sum_parts.cu


def why_not_channels(x: Tensor, dim: int, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The reason why the kernels cannot take a map of ``dim`` channels and ``tensors``, or None."""
    if dim % 4 or dim > WIDEST:
        return f'{dim} channels; the kernels take multiples of 4 up to {WIDEST}'
    for t in tensors:
        if t is not None and t.dtype not in CODES:
            return 'an input is neither float32 nor float16 nor bfloat16'
        if t is not None and t.device != x.device:
            return 'the inputs are on different devices'
    return scans.why_not(x, 1, 1)


def as_template(flag: bool) -> str:
    """``flag`` as an argument of a C++ template."""
    return str(flag).lower()


def sum_instance() -> Instance:
    return Instance('fused/sum_parts.cu', 'sum_parts')


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {sum_instance(): 75}


class SumJob(NamedTuple):
    """Parts (rows + 1, D), fp32, that are summed into the gradients by a weight (D, rows) and a
    bias (D), of these dtypes; None without one."""
    parts: int
    rows: int
    dim: int
    weight: torch.dtype | None
    bias: torch.dtype | None


@cached
def sum_launch(index: int, *jobs: SumJob) -> Callable[..., None]:
    """A launch that does at most six jobs.

    It takes the addresses (partials, dweight, dbias) of each job, one tuple after the other.
    """
    absent = (0,) * (_MOST_JOBS - len(jobs))
    blocks = sum(-(-(job.rows + 1) * job.dim // 32) for job in jobs)
    launch = kernel(index, sum_instance).bind(
        (blocks, 1, 1), (32, 32, 1), parts=(*[job.parts for job in jobs], *absent),
        rows=(*[job.rows for job in jobs], *absent), dims=(*[job.dim for job in jobs], *absent),
        weight_types=(*[CODES.get(job.weight, 0) for job in jobs], *absent),
        bias_types=(*[CODES.get(job.bias, 0) for job in jobs], *absent))

    def launch_sums(*addresses):
        partials, weights, biases = zip(*addresses, strict=True)
        launch(partials=(*partials, *absent), weights=(*weights, *absent),
               biases=(*biases, *absent))

    return launch_sums


def parameter_grads(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None, rows: int
                    ) -> None:
    """Sum ``partials`` (n, rows + 1, D), fp32, into the gradients: (D, rows) elements, and D."""
    dtypes = (None if t is None else t.dtype for t in (dweight, dbias))
    job = SumJob(len(partials), rows, partials.shape[2], *dtypes)
    sum_launch(partials.get_device(), job)(
        (partials.data_ptr(), pointer(dweight), pointer(dbias)))
