"""What the kernels share that work on maps with the channels last."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.ops import walk
from vmamba_mm.ops.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.walk import CODES

WIDEST = 4096  # channels


def why_not_channels(x: Tensor, dim: int, others: tuple[Tensor | None, ...]) -> str | None:
    """What keeps the kernels from taking a map with so many channels, or None."""
    if dim % 4 or dim > WIDEST:
        return f'{dim} channels; the kernels take multiples of 4 up to {WIDEST}'
    if any(t is not None and t.dtype not in CODES for t in others):
        return 'an input is neither float32 nor float16 nor bfloat16'
    return walk.why_not(x, 1, 1)


def sum_instance() -> Instance:
    return Instance('sum_parts.cu', 'sum_parts', 'PPPiiiii')


@cached
def sum_launch(index: int, parts: int, rows: int, dim: int, weight: torch.dtype | None,
               bias: torch.dtype | None) -> Callable[..., None]:
    """What sums ``parts`` (rows + 1, D), fp32, into gradients: (D, rows) elements, and D; given
    their dtypes. Of addresses: partials, dweight, dbias."""
    launch = kernel(index, sum_instance).bind((-(-(rows + 1) * dim // 32), 1, 1), (32, 8, 1))
    sizes = parts, rows, dim, CODES.get(weight, 0), CODES.get(bias, 0)
    return lambda partials, dweight, dbias: launch(partials, dweight, dbias, *sizes)


def parameter_grads(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None, rows: int
                    ) -> None:
    """Sum ``partials`` (n, rows + 1, D), fp32, into the gradients: (D, rows) elements, and D."""
    dtypes = (None if t is None else t.dtype for t in (dweight, dbias))
    sum_launch(partials.get_device(), len(partials), rows, partials.shape[2], *dtypes)(
        partials.data_ptr(), walk.pointer(dweight), walk.pointer(dbias))
