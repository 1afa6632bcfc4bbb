"""The sum of the maps that a scan, or its backward, wrote, and the LayerNorm that may follow."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, device_limits, kernel
from vmamba_mm.ops.fused.channels import WIDEST


def merge_instance(type_: str, maps: int, extra: bool, parts: int, to_float: bool,
                   gate: bool = False) -> Instance:
    return Instance('ss2d_scan/ss2d_merge.cu', f'ss2d_merge<{type_}, {maps}, {str(extra).lower()}, '
                    f'{parts}, {str(to_float).lower()}{", true" * gate}>')


# Of half maps the sums of 4 and of 2 (two routes to a map), in the backward with an extra one, of
# up to 128, 1536 and, for an fp32 result, 128 channels, and of 8 (ordered_scan); of fp32 maps what
# the fp32 blocks launch.
#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {
    **{merge_instance(type_, *args): low for type_, low in (('Half', 75), ('BFloat', 80))
       for args in ((4, False, 1, False), (4, False, 1, True), (4, False, 12, False),
                    (4, True, 12, False), (2, False, 12, False), (2, True, 12, False),
                    (8, False, 12, True), (8, True, 12, False))},
    **{merge_instance('Float', *args, False): 75 for args in (
        (1, True, 12), (2, True, 12), (4, False, 1), (4, False, 12), (4, True, 12))},
    # With a gate, of the channels that a vanilla VMamba has: 192 to 2,048.
    **{merge_instance(type_, 4, False, parts, False, True): low
       for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))
       for parts in (2, 12, 16)},
}


def fits(dim: int) -> bool:
    """Whether the kernel takes maps of so many channels."""
    return dim % 4 == 0 and dim <= WIDEST


@cached
def launch(index: int, dtype: torch.dtype, count: int, images: int, sizes: tuple[int, int, int],
           extra: bool, weight: torch.dtype | None = None, to_float: bool = False,
           gate_stride: int = 0) -> Callable[..., None]:
    """The sum of ``count`` maps of ``sizes`` (batch, D, length), and of ``extra``, in ``dtype`` or
    fp32; its LayerNorm for a ``weight`` of this dtype, times SiLU of a gate whose rows are
    ``gate_stride`` elements apart, 0 without one. ``images``: of a span of the scan.

    It takes the addresses ``maps``, ``extra``, ``merged``, ``normed``, ``weight``, ``bias``,
    ``moments``, each written where it is not 0, and ``gate``; and ``eps``.
    """
    batch, dim, length = sizes
    return kernel(index, merge_instance, TYPES[dtype], count, extra, -(-dim // 128),
                  to_float and dtype != torch.float32, gate_stride > 0).bind(
        (min(-(-batch * length // 8), 8 * device_limits(index)[0]), 1, 1), (256, 1, 1),
        8 * dim if weight else 0, ('eps',), batch=batch, length=length, images=images, dim=dim,
        parameter_type=CODES.get(weight, 0), gate_stride=gate_stride)


def add(maps: Tensor, extra: Tensor, images: int) -> Tensor:
    """(M, D): the sum of ``maps`` (n, B, H, W, D) and of ``extra`` (M, D), in whose memory it is
    where that is possible."""
    count, batch, _, _, dim = maps.shape
    if maps.dtype != extra.dtype or not fits(dim):
        return torch.sum(maps.flatten(1, 3), 0, dtype=torch.float32).add_(extra).to(extra.dtype)
    launch(maps.get_device(), maps.dtype, count, images, (batch, dim, len(extra) // batch), True)(
        maps=maps.data_ptr(), extra=extra.data_ptr(), merged=extra.data_ptr(), eps=0.0)
    return extra
