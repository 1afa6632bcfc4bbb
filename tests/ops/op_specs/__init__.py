"""A spec for each op: what test_ops.py has to know of it to test all that an op must do.

A new op gets a file here with a list SPECS of :class:`Spec`, and its name into the list below.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODULES = ('selective_scan', 'ssd', 'nc_ssd', 'retention', 'wkv', 'matrix_wkv', 'rwkv', 'masa',
           'linear_attention',
           'mamba', 'ss2d_scan', 'ordered_scan', 'orders', 'norms', 'convolutions', 'mlp',
           'vss_block', 'rmt_block', 'mamba_blocks')
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """One op, or one way to call it.

    Shapes are tuples that ``make`` understands, edges such as sides of 1 and odd sizes included.
    The first of ``shapes`` has at least two samples, and so few elements that gradcheck is quick.
    """

    name: str  #: in vmamba_mm.ops.core.define_op.OPS
    call: Callable  #: the public function: (inputs, **options) -> a result or a tuple
    make: Callable[..., dict[str, Tensor]]  #: (*shape) -> inputs by name, fp64 on the CPU
    #: (inputs, out_dtype) -> what the registered op and its reference take, without backend, save
    arguments: Callable
    shapes: tuple[Shape, ...]  #: for plain PyTorch, on any device; none if kernels are all there is
    kernel_shapes: tuple[Shape, ...] = ()  #: for kernels in fp32; emulated, so small
    half_shapes: tuple[Shape, ...] = ()  #: for kernels in half precision
    interpreter_shapes: tuple[Shape, ...] = ()  #: for Triton's interpreter, which is slow
    gpu_shapes: tuple[Shape, ...] = ()  #: for kernels on a GPU, any size
    maps: tuple[str, ...] = ('x',)  #: the inputs in the dtype of the map; others are parameters
    backends: tuple[str, ...] = ()  #: what a caller can choose beside None
    kernels: tuple[str, ...] = ('cuda',)
    capability: int = 75  #: the lowest that the CUDA kernels are for
    takes_out_dtype: bool = True
    #: the dtype of results under autocast by default, if not that of the map
    autocast_dtype: torch.dtype | None = None
    #: in half precision: what a user would write; None for the reference, under autocast
    naive: Callable | None = None
    flops: Callable[[Shape], int] = lambda shape: 0  #: of a forward
    limits: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float64: 1e-12, torch.float32: 1e-5})
    #: (name of an input, its replacement by what it was, part of the message)
    wrong: tuple[tuple[str, Callable, str], ...] = ()
    has_gradient: bool = True
    #: whether that is the derivative of all results, and not what was published in its place
    has_exact_gradient: bool = True
    roundings: int = 1  #: to half precision on the way to a result or a gradient, at least
    id: str = ''

    def __str__(self) -> str:
        return self.id or self.name.removesuffix('_fwd')


def randn(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def cut(dim: int) -> Callable[[Tensor], Tensor]:
    """A change for ``wrong``: one element fewer along ``dim``."""
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


def all_specs() -> list[Spec]:
    return [spec for name in MODULES for spec in importlib.import_module(f'op_specs.{name}').SPECS]
