"""What the kernels share that work on maps with the channels last."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.scan_kernels import cuda as walk
from vmamba_mm.ops.scan_kernels.cuda import CODES

WIDEST = 4096  # channels
_MOST = 6  # jobs of a launch of the kernel that sums parts


def why_not_channels(x: Tensor, dim: int, others: tuple[Tensor | None, ...]) -> str | None:
    """What keeps the kernels from taking a map with so many channels, or None."""
    if dim % 4 or dim > WIDEST:
        return f'{dim} channels; the kernels take multiples of 4 up to {WIDEST}'
    if any(t is not None and t.dtype not in CODES for t in others):
        return 'an input is neither float32 nor float16 nor bfloat16'
    return walk.why_not(x, 1, 1)


def sum_instance() -> Instance:
    return Instance('fused/sum_parts.cu', 'sum_parts', 'P' * (3 * _MOST) + 'i' * (5 * _MOST))


@cached
def sum_launch(index: int, *jobs: tuple[int, int, int, torch.dtype | None, torch.dtype | None]
               ) -> Callable[..., None]:
    """What does at most six jobs by one launch: to sum parts (rows + 1, D), fp32, into gradients,
    (D, rows) elements by a weight and D by a bias.

    A job is parts, rows, D, and the dtypes of weight and bias, None without one. Of addresses, for
    each job: partials, dweight, dbias.
    """
    blocks = sum(-(-(rows + 1) * dim // 32) for _, rows, dim, *_ in jobs)
    launch = kernel(index, sum_instance).bind((blocks, 1, 1), (32, 32, 1))
    absent = _MOST - len(jobs)
    rest = [0] * (3 * absent)
    for *sizes, weight, bias in jobs:
        rest += *sizes, CODES.get(weight, 0), CODES.get(bias, 0)
    rest += [0] * (5 * absent)
    return lambda *addresses: launch(*addresses, *rest)


def parameter_grads(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None, rows: int
                    ) -> None:
    """Sum ``partials`` (n, rows + 1, D), fp32, into the gradients: (D, rows) elements, and D."""
    dtypes = (None if t is None else t.dtype for t in (dweight, dbias))
    sum_launch(partials.get_device(), (len(partials), rows, partials.shape[2], *dtypes))(
        partials.data_ptr(), walk.pointer(dweight), walk.pointer(dbias))
