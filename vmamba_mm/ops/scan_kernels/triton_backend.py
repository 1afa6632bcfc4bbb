"""What both scans need to know of Triton before it is imported, which takes a second."""

import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = ('cuda', 'xpu')  # AMD's GPUs are 'cuda' to torch

#: Bytes of temporary memory that a block of the batch may take; a single image may take more.
_BLOCK = 1 << 29


def why_not(x: Tensor, out_dtype: torch.dtype, by_default: bool) -> str | None:
    """The reason why the kernels cannot take these inputs, or None.

    Args:
        x: (B, ...), the map; its parameters may have any dtype.
        by_default: whether no backend was named: then the interpreter, which is slow, is not
            taken.
    """
    reason = _device_reason(x.device.type, x.device.index, by_default)
    if reason is not None:
        return reason
    if x.dtype not in _DTYPES or out_dtype not in _DTYPES:
        return f'x is {x.dtype} and out_dtype {out_dtype}; the kernels take and give ' \
               'float32, float16 and bfloat16'
    if 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:],
                                                            strict=True)) >= 2**31:
        return 'a sample spans 2^31 elements or more'
    return None


@torch.compiler.assume_constant_result
def _device_reason(kind: str, index: int | None, by_default: bool) -> str | None:
    interprets = os.environ.get('TRITON_INTERPRET') == '1'
    if kind not in _DEVICES and not (kind == 'cpu' and interprets and not by_default):
        return f'x is on {kind}, not on a GPU (nor is TRITON_INTERPRET=1 set)'
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    return _version_reason() or (None if interprets else _gpu_reason(kind, index))


@cache
def _version_reason() -> str | None:
    import triton
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        return f'triton 3.3 or newer is wanted, this is {triton.__version__}'
    return None


@cache
def _gpu_reason(kind: str, index: int | None) -> str | None:
    if kind == 'cuda' and not torch.version.hip:
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            return f'Triton wants compute capability 8.0, this GPU has {capability}'
    try:
        import triton
        triton.runtime.driver.active.get_current_target()
    except Exception as err:  # no C compiler, a driver that does not fit, ...
        return f'triton does not work here: {err}'
    return None


def load_launches() -> ModuleType:
    """:mod:`vmamba_mm.ops.scan_kernels.triton_launch`, which imports triton."""
    from vmamba_mm.ops.scan_kernels import triton_launch
    return triton_launch


def tile_length(interpreted: bool, backward: bool) -> int:
    """Positions of a tile, all of them in a thread's registers; few in the slow interpreter."""
    if interpreted:
        return 8
    return 8 if backward else 16


def blocks(batch: int, bytes_each: int) -> Iterator[slice]:
    """Slices of the batch whose temporary memory stays in bounds."""
    size = max(1, _BLOCK // bytes_each)
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))


def carry_bytes(length: int, tile: int, routes: int, dim: int, state: int, backward: bool) -> int:
    """Bytes of what enters the tiles of one sample."""
    return 4 * -(-length // tile) * routes * dim * ((1 + backward) * state + 1)
