"""The first half of an MLP, gelu(x w1^T + b1): by one kernel on sm_90, whose tensor cores read
shared memory, and elsewhere by a product and ``gelu.cu``."""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.launch import (
    TYPES,
    Instance,
    cached,
    device_limits,
    has_groups_of_warps,
    kernel,
)
from vmamba_mm.ops.scan_kernels.cuda import dense

_TILE = 64  # rows and columns of a tile, whose elements have 2 bytes
_GROUPS = 4  # of four warps

#: How the kernel is cut up, for tests, and whether it is used however few rows there are.
force: 'Shape | None' = None


class Shape(NamedTuple):
    """Of a block's four groups of warps ``wide`` form a team, in which each has so many ``tiles``
    of the columns; ``stages`` parts of a team's x are in shared memory."""
    wide: int
    tiles: int
    stages: int

    @property
    def teams(self) -> int:
        return _GROUPS // self.wide

    @property
    def columns(self) -> int:
        return _TILE * self.tiles * self.wide

    def shared(self, dim: int) -> int:
        """Bytes of shared memory."""
        tiles = self.stages * self.teams + -(-dim // _TILE) * self.wide * self.tiles
        return tiles * _TILE * _TILE * 2 + 4 * self.columns

    def blocks(self, rows: int, hidden: int, multiprocessors: int) -> tuple[int, int]:
        """Blocks, and into how many parts the columns are divided among them."""
        parts = -(-hidden // self.columns)
        together = min(max(multiprocessors // parts, 1), -(-rows // (_TILE * self.teams)))
        return parts * together, parts

    def clocks(self, rows: int, hidden: int, dim: int, multiprocessors: int) -> float:
        """What it takes, roughly: products, and 14 instructions an element for GELU."""
        blocks, parts = self.blocks(rows, hidden, multiprocessors)
        tiles = -(-rows // _TILE)
        turns = -(-tiles // (blocks // parts * self.teams))
        depth = -(-dim // 32) * 32
        return turns * _TILE * self.teams * self.columns * (depth / 2048 + 18 / 128)


#: The cuts that are compiled.
SHAPES = Shape(2, 3, 4), Shape(2, 2, 4), Shape(1, 3, 2), Shape(1, 2, 3)


def gelu_instance(type_: str) -> Instance:
    return Instance('fused/gelu.cu', f'gelu_map<{type_}>')


def linear_instance(type_: str, shape: Shape) -> Instance:
    return Instance('fused/linear_gelu.cu',
                    f'linear_gelu<{type_}, {shape.wide}, {shape.tiles}, {shape.stages}>', only=90)


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {
    **{linear_instance(type_, shape): 90 for type_ in ('Half', 'BFloat') for shape in SHAPES},
    **{gelu_instance(type_): low for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))}}


@cached
def gelu_launch(index, dtype, size):
    """GELU of so many elements, a multiple of 4. It takes the addresses ``x`` and ``y``, which may
    be the same."""
    return kernel(index, gelu_instance, TYPES[dtype]).bind(
        (-(-size // 4096), 1, 1), (256, 1, 1), size=size)


def shape_for(index: int, dtype: torch.dtype, rows: int, hidden: int, dim: int) -> Shape | None:
    """The quickest cut, or None where a product and GELU are quicker, or nothing else is there."""
    if dtype == torch.float32 or dim % 8 or hidden % 8 or not has_groups_of_warps(index):
        return None
    if force:
        return force
    multiprocessors, _, most_shared = device_limits(index)
    shapes = [shape for shape in SHAPES if shape.shared(dim) <= most_shared
              and -(-rows // _TILE) * -(-hidden // shape.columns) >= 4 * multiprocessors]
    return min(shapes, default=None,
               key=lambda shape: shape.clocks(rows, hidden, dim, multiprocessors))


@cached
def hidden_launch(index: int, dtype: torch.dtype, rows: int, hidden: int, dim: int,
                  tf32: bool = False) -> gemm.Product:
    """Its ``run`` takes the addresses of x (rows, dim), w1 (hidden, dim), of what GELU takes and of
    what it gives, both (rows, hidden), of the workspace and of b1 (hidden), all of ``dtype`` and
    at multiples of 16. What GELU takes may be its result; then it is not kept."""
    shape = shape_for(index, dtype, rows, hidden, dim)
    if shape is not None:
        blocks, parts = shape.blocks(rows, hidden, device_limits(index)[0])
        launch = kernel(index, linear_instance, TYPES[dtype], shape).bind(
            (blocks, 1, 1), (128 * _GROUPS, 1, 1), shape.shared(dim), rows=rows, columns=hidden,
            inner=dim, parts=parts)

        def run_one(x, weight, inner, y, workspace, bias):
            launch(x=x, weight=weight, bias=bias, y=y, product=0 if inner == y else inner)

        return gemm.Product(run_one, 0)

    product = gemm.product(index, dtype, dtype, rows, hidden, dim, right_t=True, bias=True,
                           tf32=tf32)
    gelu = gelu_launch(index, dtype, rows * hidden)

    def run(x, weight, inner, y, workspace, bias):
        product.run(x, weight, inner, workspace, bias)
        gelu(x=inner, y=y)

    return gemm.Product(run, product.workspace)


def hidden_layer(x: Tensor, w1: Tensor, b1: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """(what GELU takes, what it gives), both (rows, H), of x (..., C); the first one is lost unless
    ``save``."""
    x = x.reshape(-1, x.shape[-1])
    index, rows = x.get_device(), len(x)
    if rows and shape_for(index, x.dtype, rows, *w1.shape):
        x, w1, b1 = map(dense, (x, w1, b1))
        hidden = x.new_empty((rows, len(w1)))
        inner = torch.empty_like(hidden) if save else hidden
        hidden_launch(index, x.dtype, rows, *w1.shape).run(
            x.data_ptr(), w1.data_ptr(), inner.data_ptr(), hidden.data_ptr(), 0, b1.data_ptr())
        return inner, hidden
    inner = torch.addmm(b1, x, w1.T)
    hidden = torch.empty_like(inner) if save else inner
    if rows:
        gelu_launch(index, x.dtype, inner.numel())(x=inner.data_ptr(), y=hidden.data_ptr())
    return inner, hidden
