"""What the kernels share that work on maps with the channels last."""

from torch import Tensor

from vmamba_mm.ops import walk
from vmamba_mm.ops.nvrtc import Instance, kernel
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


def parameter_grads(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None, rows: int
                    ) -> None:
    """Sum ``partials`` (n, rows + 1, D), fp32, into the gradients: (D, rows) elements, and D."""
    codes = [0 if t is None else CODES[t.dtype] for t in (dweight, dbias)]
    dim, index = partials.shape[2], partials.get_device()
    kernel(index, sum_instance).launch(
        (-(-(rows + 1) * dim // 32), 1, 1), (32, 8, 1),
        (partials.data_ptr(), walk.pointer(dweight), walk.pointer(dbias), len(partials), rows, dim,
         *codes))
