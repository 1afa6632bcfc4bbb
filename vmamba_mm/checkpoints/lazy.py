"""Weights in safetensors, one file or several: names and shapes first, each tensor when it is asked
for, so that a model which fills the memory can be read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba_mm.checkpoints.formats import find_kind, find_parts, open_safetensors
from vmamba_mm.errors import UserError

_DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
               I64=torch.int64, I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)


class LazyWeights:
    """What a checkpoint of safetensors holds, of which only the headers were read.

    Args:
        file_of: name of a weight -> the file that holds it; None for all that is in ``paths``.
        paths: the files, in order.

    Raises:
        UserError: if a file cannot be read, or lacks a weight.
    """

    def __init__(self, paths: list[Path], file_of: dict[str, str] | None = None):
        self.paths = paths
        #: By name, of the right shape and dtype, on the device meta.
        self.shapes: dict[str, Tensor] = {}
        self.meta: dict[str, Any] = {}
        for path in paths:
            with open_safetensors(path) as (f, meta):
                self.meta |= meta
                for name in f.keys():  # noqa: SIM118
                    part = f.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.float32)
                    self.shapes[name] = torch.empty(part.get_shape(), dtype=dtype, device='meta')
        missing = sorted(set(file_of or ()) - set(self.shapes))
        if missing:
            raise UserError(f'{paths[0].parent} is incomplete: {missing[0]} is not in '
                            f'{file_of[missing[0]]}')

    def read(self, *names: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, file by file, of which none is kept: some, or all of them."""
        for path in self.paths:
            with open_safetensors(path) as (f, _):
                for name in f.keys():  # noqa: SIM118
                    if not names or name in names:
                        yield name, f.get_tensor(name)


def open_lazily(path: Path) -> LazyWeights | None:
    """The weights at ``path``, a file, an index or a folder of Hugging Face's; None where they are
    not in safetensors.

    Raises:
        UserError: as :func:`vmamba_mm.checkpoints.formats.read_content`.
    """
    parts = find_parts(path)
    if parts is None:
        return None
    paths, file_of = parts
    if any(find_kind(part) != 'safetensors' for part in paths):
        return None
    return LazyWeights(paths, file_of)
