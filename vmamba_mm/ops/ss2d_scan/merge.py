"""The sum of the maps that a scan, or its backward, wrote, and the LayerNorm that may follow."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.fused.channels import WIDEST
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES, device_limits


def merge_instance(type_: str, maps: int, extra: bool, parts: int, to_float: bool) -> Instance:
    return Instance('ss2d_merge.cu', f'ss2d_merge<{type_}, {maps}, {str(extra).lower()}, {parts}, '
                    f'{str(to_float).lower()}>', 'P' * 7 + 'fiiiii')


def fits(dim: int) -> bool:
    """Whether the kernel takes maps of so many channels."""
    return dim % 4 == 0 and dim <= WIDEST


@cached
def launch(index: int, dtype: torch.dtype, count: int, images: int, sizes: tuple[int, int, int],
           extra: bool, weight: torch.dtype | None = None, to_float: bool = False
           ) -> Callable[..., None]:
    """The sum of ``count`` maps of ``sizes`` (batch, D, length), and of ``extra``, in ``dtype`` or
    fp32; its LayerNorm for a ``weight`` of this dtype. ``images``: of a span of the scan.

    Of addresses: maps, extra, merged, normed, weight, bias, moments, each written where it is not
    0; and eps.
    """
    batch, dim, length = sizes
    run = kernel(index, merge_instance, TYPES[dtype], count, extra, -(-dim // 128),
                 to_float and dtype != torch.float32).bind(
        (min(-(-batch * length // 8), 8 * device_limits(index)[0]), 1, 1), (256, 1, 1),
        8 * dim if weight else 0)
    rest = batch, length, images, dim, CODES.get(weight, 0)
    return lambda *addresses: run(*addresses, *rest)


def add(maps: Tensor, extra: Tensor, images: int) -> Tensor:
    """(M, D): the sum of ``maps`` (n, B, H, W, D) and of ``extra`` (M, D), in whose memory it is
    where that is possible."""
    count, batch, _, _, dim = maps.shape
    if maps.dtype != extra.dtype or not fits(dim):
        return torch.sum(maps.flatten(1, 3), 0, dtype=torch.float32).add_(extra).to(extra.dtype)
    launch(maps.get_device(), maps.dtype, count, images, (batch, dim, len(extra) // batch), True)(
        maps.data_ptr(), extra.data_ptr(), extra.data_ptr(), 0, 0, 0, 0, 0.0)
    return extra
