"""Launches of the kernels in ``kernels/ssd``, on addresses.

A chunk is :data:`CHUNK` tokens. Where sequences are few and long, they are divided into spans of
chunks: one launch finds what each does to a state from zero, one what enters each, and the scan
runs from there. ``kernels/README.md`` says how the kernels work. They need sm_80.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
)

CHUNK = 64  # Q in ssd.cuh
_BLOCK = 16
STATES = 16, 32, 64, 128, 256  # N of the kernels
MOST_CHANNELS = 128

#: Chunks of a span at most, for tests.
max_span: int | None = None
#: How forwards are divided, for tests and measurements.
force: 'Shape | None' = None


class Shape(NamedTuple):
    """How a block of the forward is made up: 16 * ``tiles`` channels to a warp, ``slices`` warps to
    a head, ``heads`` heads; ``stages`` chunks in shared memory."""
    tiles: int
    slices: int
    heads: int
    stages: int

    @property
    def width(self) -> int:
        return _BLOCK * self.tiles * self.slices

    def shared(self, size: int, states: int) -> int:
        """Bytes of shared memory, for elements of so many bytes; as ForwardShared."""
        stage = self.heads * _tile(self.width, size) + 2 * _tile(states, size)
        return self.stages * stage + self.heads * (_tile(CHUNK, size) + 2 * _DECAYS)


_DECAYS = 4 * (6 * CHUNK + 8)


def _tile(columns: int, size: int) -> int:
    """Bytes of a tile with a row for each token."""
    return CHUNK * (columns * size + 16)


def padded_states(state: int) -> int:
    """N of the kernels for so many states."""
    return next(n for n in STATES if n >= state)


# --- what is compiled -------------------------------------------------------------------------

def _flag(value: bool) -> str:
    return str(value).lower()


def forward_instance(type_: str, fast: bool, shape: Shape, states: int) -> Instance:
    return Instance('ssd/ssd_fwd.cu',
                    f'ssd_fwd<{type_}, {_flag(fast)}, {shape.tiles}, {shape.slices}, {states}, '
                    f'{shape.heads}, {shape.stages}>')


# --- sizes ------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    batch: int
    length: int
    heads: int
    dim: int
    groups: int
    state: int

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    @property
    def states(self) -> int:
        """N of the kernels."""
        return padded_states(self.state)


class Strides(NamedTuple):
    """Of a map (B, L, H, ...), in elements."""
    b: int
    l: int  # noqa: E741
    h: int


class Options(NamedTuple):
    """What a call says beside its tensors. Types are those of parameters, None for absent ones."""
    dt: torch.dtype
    A: torch.dtype
    D: torch.dtype | None
    D_full: bool
    bias: torch.dtype | None
    softplus: bool
    low: float
    high: float
    reverse: bool

    def fields(self) -> dict[str, int | float]:
        return dict(step_A_type=CODES[self.A], step_bias_type=CODES.get(self.bias, 0),
                    step_dt_type=CODES[self.dt], step_softplus=int(self.softplus),
                    step_low=self.low, step_high=self.high)


def _map_fields(**strides: Strides) -> dict[str, int]:
    return {f'{name}_{side}': value for name, of in strides.items()
            for side, value in of._asdict().items()}


# --- plans ------------------------------------------------------------------------------------

def forward_shape(index: int, size: int, sizes: Sizes) -> Shape:
    """The least shared memory that has two stages, else one."""
    if force is not None:
        return force
    slices = next(n for n in (1, 2, 4, 8) if _BLOCK * n >= sizes.dim)
    shape = Shape(1, slices, 1, 2)
    if shape.shared(size, sizes.states) > device_limits(index)[2]:
        shape = shape._replace(stages=1)
    return shape


# --- launches ---------------------------------------------------------------------------------

class Launch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs."""
    run: Callable[..., None]
    memory: int


@cached
def forward_launch(index: int, dtype: torch.dtype, fast: bool, sizes: Sizes, options: Options,
                   x: Strides, z: Strides, y: Strides, dt: Strides, B: Strides, C: Strides
                   ) -> Launch:
    """The forward.

    It takes the addresses of x, dt, A, B, C, y and memory, and, 0 for none, of D, bias, z, start
    and last (the initial and the final state, (B, H, P, N), fp32).
    """
    shape = forward_shape(index, dtype.itemsize, sizes)
    columns = -(-sizes.dim // shape.width)
    run = kernel(index, forward_instance, TYPES[dtype], fast, shape, sizes.states).bind(
        (sizes.batch * sizes.heads // shape.heads * columns, 1, 1),
        (32 * shape.slices * shape.heads, 1, 1), shape.shared(dtype.itemsize, sizes.states),
        length=sizes.length, heads=sizes.heads, per_group=sizes.heads // sizes.groups,
        dim=sizes.dim, state=sizes.state, columns=columns, span=sizes.chunks, spans=1,
        reverse=int(options.reverse), D_type=CODES.get(options.D, 0), D_full=int(options.D_full),
        **options.fields(), **_map_fields(x=x, z=z, y=y, dt=dt, B=B, C=C))

    def launch_forward(x, dt, A, B, C, y, memory, D=0, bias=0, z=0, start=0, last=0):
        run(x_data=x, dt_data=dt, step_A=A, B_data=B, C_data=C, y_data=y, D=D, step_bias=bias,
            z_data=z, entries=start, last=last)

    return Launch(launch_forward, 0)
