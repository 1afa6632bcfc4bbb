"""``mamba_blocks`` by the CUDA kernels of the ops that a block is made of, and cuBLASLt.

A small batch waits for Python. So what depends on sizes and dtypes is worked out once, a call deals
in addresses, and one slab of memory serves all blocks.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.causal_conv.cuda import TAPS
from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, Slab, aligned, cached, kernel
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import WIDEST
from vmamba_mm.ops.mamba_blocks.weights import Direction, Weights, after_norm, flatten, split
from vmamba_mm.ops.mamba_inner import cuda as inner
from vmamba_mm.ops.scan_kernels import cuda as scans

# Kinds of parameters in gather.cu.
COPY = 0
NEGATIVE_EXP = 1
FACTOR = 2
_MOST = 16  # MOST there
_MOST_GRADIENTS = 14  # MOST in scatter.cu
_KINDS = Direction(COPY, COPY, FACTOR, FACTOR, COPY, NEGATIVE_EXP, COPY)


def gather_instance(type_: str) -> Instance:
    return Instance('mamba_blocks/gather.cu', f'gather<{type_}>')


def scatter_instance() -> Instance:
    return Instance('mamba_blocks/scatter.cu', 'scatter')


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {
    gather_instance('Half'): 75, gather_instance('BFloat'): 80, gather_instance('Float'): 75,
    scatter_instance(): 75}


def why_not(hidden: Tensor, residual: Tensor | None, first: Weights, dtype: torch.dtype
            ) -> str | None:
    """The reason why ``mamba_blocks`` cannot take blocks like ``first`` on these streams, or None;
    ``hidden`` is on a GPU."""
    direction = first.directions[0]
    inner_dims, dim = direction.x_proj.shape[1], hidden.shape[2]
    if dim % 8 or inner_dims % 8 or dim > WIDEST:
        return (f'{dim} channels and {inner_dims} inner ones: it takes multiples of 8, the former '
                f'up to {WIDEST}')
    if first.in_proj.device != hidden.device:
        return 'its parameters are on another device than the input'
    if residual is not None and residual.dtype != torch.float32:
        return 'the residual stream is not float32'
    dtypes = [t.dtype for t in flatten(first)]
    if all([d == dtypes[0] for d in dtypes]):  # mostly, and a small batch waits for the questions
        dtypes = dtypes[:1]
    elif first.norm_bias is not None and first.norm_bias.dtype != first.norm.dtype:
        return 'weight and bias of a norm are in different dtypes'
    if dtype not in CODES or hidden.dtype not in CODES or any([d not in CODES for d in dtypes]):
        return 'an input is neither float32 nor float16 nor bfloat16'
    if dtype == torch.float32 and any([d != dtype for d in (hidden.dtype, *dtypes)]):
        return 'matrix products in float32 are for streams and parameters in float32'
    if any([t.dtype not in (dtype, torch.float32) for t in (first.in_proj, first.out_proj)]):
        return f'a parameter of a matrix product is neither float32 nor {dtype}'
    if direction.conv.shape[2] not in TAPS:
        return f'{direction.conv.shape[2]} taps; the kernels take {TAPS[0]} to {TAPS[-1]}'
    if hidden.shape[1] == 0 or hidden.shape[1] * 2 * inner_dims >= 2**31:
        return 'a sample has no token, or 2^31 elements or more'
    return (scans.why_not(hidden, 0, 1) or gemm.why_not()
            or inner.why_not_here(hidden.device.index, dtype, direction.A_log.shape[1]))


class Sizes(NamedTuple):
    """Of the streams and a block."""
    batch: int
    length: int
    dim: int     # of a token
    inner: int
    taps: int
    rank: int
    state: int
    routes: int

    @classmethod
    def of(cls, hidden: Tensor, weights: Weights) -> 'Sizes':
        conv, _, x_proj, dt_proj, _, A_log, _ = weights.directions[0]
        return cls(*hidden.shape, x_proj.shape[1], conv.shape[2], dt_proj.shape[1],
                   A_log.shape[1], len(weights.directions))

    @property
    def mixer(self) -> inner.Sizes:
        """As ``mamba_inner`` has them."""
        width = 2 * self.inner
        return inner.Sizes(self.batch, self.length, self.inner, self.routes, self.taps, self.rank,
                           self.state, self.length * width, width)

    @property
    def direction(self) -> Direction:
        """Elements of the parameters of a direction."""
        by_inner = Direction(conv=self.taps, conv_bias=1, x_proj=self.rank + 2 * self.state,
                             dt_proj=self.rank, dt_bias=1, A_log=self.state, D=1)
        return Direction(*[self.inner * n for n in by_inner])


class _Blocks:
    """The launches of blocks of these sizes and dtypes.

    Args:
        hidden_dtype: of the stream that comes in.
        dtypes: of a block's weights, all of the others are the same.
        begins: whether the stream ``residual`` begins with the first block.
    """

    def __init__(self, index: int, sizes: Sizes, hidden_dtype: torch.dtype, dtype: torch.dtype,
                 tf32: bool, dtypes: tuple[torch.dtype, ...], scale: float, begins: bool):
        batch, length, dim, inner_dims, *_ = sizes
        self.begins, rows = begins, batch * length
        kinds = next(split(dtypes, 1))

        def norm_launch(branch):
            return norm.forward_launch(index, torch.float32, branch, dtype, kinds.norm, batch,
                                       length, dim, kinds.norm_bias is None)

        self.first_norm = norm_launch(None if begins else hidden_dtype)
        self.norm = norm_launch(dtype)
        products = [gemm.product(index, dtype, dtype, rows, columns, width, right_t=True, tf32=tf32)
                    for columns, width in ((2 * inner_dims, dim), (dim, inner_dims))]
        self.in_proj, self.out_proj = (product.run for product in products)
        self.mixer = inner.forward_launch(
            index, sizes.mixer, inner.Dtypes(dtype, *[torch.float32] * 5), False, scale, False)

        slab, size = Slab(), dtype.itemsize
        self.gather = Gather(index, dtype, slab, sizes, kinds)
        self.normed_at, self.xz_at = slab.take(rows * dim, size), slab.take(
            rows * 2 * inner_dims, size)
        self.y_at = slab.take(rows * inner_dims, size)
        self.workspace_at = slab.take(max(product.workspace for product in products), 1)
        self.memory_at = slab.take(self.mixer.memory, 1)
        self.slab_size = slab.size

    def launch(self, count: int, eps: float, hidden_in: int, residual_in: int, hidden: int,
               residual: int, slab: int, *addresses: int) -> None:
        """``count`` blocks, on addresses; ``addresses`` are those of the weights."""
        normed, xz, y = slab + self.normed_at, slab + self.xz_at, slab + self.y_at
        workspace, gather = slab + self.workspace_at, self.gather
        of_directions = gather.of_directions(slab)
        for i, weights in enumerate(split(addresses, count)):
            gather(weights, slab)
            affine = dict(weight=weights.norm, bias=weights.norm_bias or 0)
            if i == 0:
                self.first_norm(x=residual_in, branch=0 if self.begins else hidden_in,
                                sum=0 if self.begins else residual, normed=normed, eps=eps,
                                **affine)
            else:
                self.norm(x=residual_in if i == 1 and self.begins else residual, branch=hidden,
                          sum=residual, normed=normed, eps=eps, **affine)
            self.in_proj(normed, slab + gather.in_proj, xz, workspace)
            self.mixer.run(xz=xz, y=y, memory=slab + self.memory_at, **of_directions)
            self.out_proj(y, slab + gather.out_proj, hidden, workspace)


def gather_launch(index: int, dtype: torch.dtype, sizes: Sequence[int],
                  dtypes: Sequence[torch.dtype], kinds: Sequence[int], offsets: Sequence[int]
                  ) -> Callable[[Sequence[int], int], None]:
    """What brings at most 16 parameters together, of so many elements, multiples of 4, in these
    dtypes and of these kinds, each to its offset in bytes, a multiple of 16; factors in ``dtype``.
    It takes their addresses and that of the memory for them."""
    starts = [0, *accumulate(size // 4 for size in sizes)]
    absent = (0,) * (_MOST - len(sizes))
    launch = kernel(index, gather_instance, TYPES[dtype]).bind(
        (min(1024, -(-starts[-1] // 256)), 1, 1), (256, 1, 1),
        starts=(*starts, *[starts[-1]] * len(absent)), offsets=(*offsets, *absent),
        types=(*[CODES[type_] for type_ in dtypes], *absent), kinds=(*kinds, *absent))
    return lambda sources, to: launch(sources=(*sources, *absent), to=to)


def scatter_launch(index: int, sizes: Sequence[int], dtypes: Sequence[torch.dtype],
                   offsets: Sequence[int], factors: Sequence[int]
                   ) -> Callable[[Sequence[int], int], None]:
    """The reverse for at most 14 gradients, which lie in fp32; ``factors`` are the offsets of what
    they are multiplied by, or -1. It takes the addresses of the gradients and of the memory."""
    starts = [0, *accumulate(size // 4 for size in sizes)]
    absent = (0,) * (_MOST_GRADIENTS - len(sizes))
    launch = kernel(index, scatter_instance).bind(
        (min(1024, -(-starts[-1] // 256)), 1, 1), (256, 1, 1),
        starts=(*starts, *[starts[-1]] * len(absent)), offsets=(*offsets, *absent),
        factors=(*factors, *absent), types=(*[CODES[type_] for type_ in dtypes], *absent))
    return lambda targets, base: launch(targets=(*targets, *absent), base=base)


class Gather:
    """A block's parameters in a slab, as the launches take them.

    ``dtypes`` are those of the block's weights.
    """

    def __init__(self, index: int, dtype: torch.dtype, slab: Slab, block: Sizes, dtypes: Weights):
        factor_size, sizes = block.dim * block.inner, block.direction
        self.in_proj = slab.take(2 * factor_size, dtype.itemsize)
        self.out_proj = slab.take(factor_size, dtype.itemsize)
        itemsizes = [dtype.itemsize if kind == FACTOR else 4 for kind in _KINDS]
        #: where those of all directions begin, side by side
        self.starts = Direction(*[slab.take(len(dtypes.directions) * size, itemsize)
                                  for size, itemsize in zip(sizes, itemsizes, strict=True)])
        # Size, dtype, kind and offset of each parameter after the norm.
        jobs = [(2 * factor_size, dtypes.in_proj, FACTOR, self.in_proj),
                (factor_size, dtypes.out_proj, FACTOR, self.out_proj)]
        for k, direction in enumerate(dtypes.directions):
            offsets = [start + k * size * itemsize for start, size, itemsize
                       in zip(self.starts, sizes, itemsizes, strict=True)]
            jobs += zip(sizes, direction, _KINDS, offsets, strict=True)
        self._launch = gather_launch(index, dtype, *zip(*jobs, strict=True))

    def __call__(self, weights: Weights, slab: int) -> None:
        """Gather what is at these addresses in the slab at that one."""
        self._launch(after_norm(weights), slab)

    def of_directions(self, slab: int) -> dict[str, int]:
        """The addresses as ``mamba_inner`` takes them."""
        return {name: slab + start
                for name, start in zip(inner.PARAMETERS, self.starts, strict=True)}


_blocks_of = cached(_Blocks)


def forward(hidden: Tensor, residual: Tensor | None, weights: list[Tensor], count: int,
            eps: float, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.mamba_blocks.mamba_blocks`, ``weights`` all tensors of its
    ``count`` blocks in a list."""
    begins = residual is None
    if begins:
        residual = hidden.float()
    (hidden_in, residual_in, *weights), addresses = aligned(hidden, residual, *weights)
    first = next(split(weights, count))
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    index = hidden.get_device()
    blocks = _blocks_of(index, Sizes.of(hidden, first), hidden.dtype, dtype, tf32,
                        tuple([t.dtype for t in flatten(first)]), scale, begins)
    hidden = hidden.new_empty(hidden.shape, dtype=dtype)
    if begins and count == 1:  # nothing is added to it
        residual = residual_in.clone()
    else:
        residual = torch.empty_like(residual_in)
    slab = hidden.new_empty(blocks.slab_size, dtype=torch.uint8)
    arguments = (count, eps, *addresses[:2], hidden.data_ptr(), residual.data_ptr(),
                 slab.data_ptr(), *addresses[2:])
    replay(index, (blocks, arguments), lambda: blocks.launch(*arguments))
    return residual, hidden
