"""Launches of the Triton kernels: the arguments of a walk, what its tiles carry, the cut."""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vmamba_mm.ops.scan_kernels.triton_kernels import (
    chain_tiles,
    scan_tiles,
    scan_tiles_backward,
    summarise_tiles,
)

#: Programs that a launch should have: enough for any chip, few enough to keep their sums small.
_PROGRAMS = 8192
#: Registers of a thread on NVIDIA GPUs, of programs of one or two warps: left alone the compiler
#: takes 255, and the few threads that fit then wait for memory (5.7 and not 6.3 ms on an H100).
_REGISTERS = 168


class Walk(NamedTuple):
    """One axis of the map, the walk along it and (``ways`` 2) its reverse.

    ``u`` is the map. ``delta``, ``B`` and ``C`` are tensors of their own or (``project``) the same
    one, which has the R numbers of dt, N of B and N of C side by side for each route. Strides are
    of (batch, group, line, step, channel or state), in elements; those of C are those of B.
    ``A``, ``weight`` (K, R, D), ``bias`` (K, D) and ``skip`` (groups, D) or None are fp32.
    """
    u: Tensor
    u_strides: tuple[int, ...]
    delta: Tensor
    delta_strides: tuple[int, ...]
    B: Tensor
    C: Tensor
    c_strides: tuple[int, ...]
    A: Tensor
    weight: Tensor
    bias: Tensor
    skip: Tensor | None
    batch: int
    groups: int
    length: int
    line_length: int
    first_route: int
    ways: int
    project: bool
    softplus: bool

    @property
    def routes(self) -> int:
        return self.A.shape[0]

    def sizes(self, tile: int) -> tuple[dict, dict]:
        """The arguments of a launch that all kernels share, and its options."""
        _, state, dim = self.A.shape
        if tile > self.line_length:
            wraps = 2
        else:
            wraps = int(self.line_length < self.length)
        width, options = channel_block(dim)
        numbers = dict(groups=self.groups, dim=dim, length=self.length,
                       line_length=self.line_length, tiles=-(-self.length // tile),
                       blocks=-(-dim // width), k_first=self.first_route, routes=self.routes,
                       N=state, R=self.weight.shape[1], T=tile, BD=width, WAYS=self.ways,
                       WRAPS=wraps, PROJECT=self.project, SOFTPLUS=self.softplus)
        return numbers, options


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, as TRITON_INTERPRET said at import."""
    return not isinstance(scan_tiles, triton.runtime.JITFunction)


@functools.cache
def _precision() -> str:
    """Of products of fp32 tiles: fp32's, on NVIDIA GPUs by three products of tensor cores."""
    return 'tf32x3' if not interpreted() and _target(_device())[0] == 'cuda' else 'ieee'


def _device() -> int:
    return triton.runtime.driver.active.get_current_device()


@functools.cache
def _target(device: int) -> tuple[str, int]:
    """Triton's name of the backend of the current device, and the lanes of its warps."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


def channel_block(dim: int) -> tuple[int, dict[str, int]]:
    """Channels of a program, one for each thread, as wide as wastes least; and how to launch."""
    if interpreted():
        return min(triton.next_power_of_2(dim), 32), {}
    backend, lanes = _target(_device())
    warps = min((4, 2, 1), key=lambda n: -(-dim // (n * lanes)) * n)
    options = dict(num_warps=warps)
    if backend == 'cuda' and warps < 4:
        options['maxnreg'] = _REGISTERS
    return warps * lanes, options


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type == 'cpu':
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


class Carries:
    """What enters each tile of every route: states, and gradients for the backward."""

    def __init__(self, walk: Walk, tile: int, with_grad: bool):
        state, dim = walk.A.shape[1:]
        self.tile, self.tiles = tile, -(-walk.length // tile)
        empty = walk.u.new_empty
        shape = (walk.batch, walk.routes, state, self.tiles, dim)
        if self.tiles == 1:  # nothing is carried; the kernels want a pointer
            self.states = self.grads = self.totals = empty(1, dtype=torch.float32)
            return
        self.totals = empty(walk.batch, walk.routes, self.tiles, dim, dtype=torch.float32)
        self.states = empty(shape, dtype=torch.float32)
        self.grads = empty(shape if with_grad else 1, dtype=torch.float32)

    def summarise(self, walk: Walk, grad: Tensor | None = None,
                  grad_strides: tuple[int, ...] = (0,) * 5) -> None:
        if self.tiles > 1:
            sizes, options = walk.sizes(self.tile)
            grid = (sizes['blocks'] * self.tiles * walk.groups * walk.batch,)
            summarise_tiles[grid](
                walk.u, *walk.u_strides, walk.delta, *walk.delta_strides, walk.B, walk.C,
                *walk.c_strides, walk.u if grad is None else grad, *grad_strides, walk.A,
                walk.weight, walk.bias, self.totals, self.states, self.grads, **sizes,
                GRAD=grad is not None, **options)

    def chain(self, walk: Walk, with_grad: bool) -> None:
        if self.tiles > 1:
            sizes, options = walk.sizes(self.tile)
            names = ('dim', 'tiles', 'blocks', 'routes', 'N', 'BD')
            grid = (sizes['blocks'] * walk.A.shape[1] * walk.routes * walk.batch, 1 + with_grad)
            chain_tiles[grid](
                self.totals, self.states, self.grads, walk.A,
                stride_d=1, reversed_from=2 if walk.project else walk.routes,
                **{name: sizes[name] for name in names}, U=2 if interpreted() else 16, **options)


def scan(walk: Walk, carries: Carries, y: Tensor, y_strides: tuple[int, ...],
         partial: Tensor | None) -> None:
    """Write the walk's y, and ``partial`` (fp32, of the same strides) added to it."""
    sizes, options = walk.sizes(carries.tile)
    grid = (sizes['blocks'] * carries.tiles * walk.groups * walk.batch,)
    scan_tiles[grid](
        walk.u, *walk.u_strides, walk.delta, *walk.delta_strides, walk.B, walk.C,
        *walk.c_strides, y, y if partial is None else partial, *y_strides, walk.A, walk.weight,
        walk.bias, walk.bias if walk.skip is None else walk.skip, carries.states, **sizes,
        SKIP=walk.skip is not None, ADD=partial is not None, **options)


def scan_backward(walk: Walk, carries: Carries, grad: Tensor, grad_strides: tuple[int, ...],
                  grad_u: Tensor, grad_delta: Tensor | None, out_strides: tuple[int, ...],
                  add: bool, parts: Tensor) -> Tensor:
    """Write the gradients of maps, add to ``grad_u`` if told; return (K, R + N + 2, D), the
    gradients by the weight, A, the bias and the skip.

    Args:
        grad_delta: None of projected dt.
        parts: a partial sum for each of P blocks of channels: (P, *delta.shape) of projections,
            else (2, P, *B.shape), the gradients by B and C.
    """
    sizes, options = walk.sizes(carries.tile)
    programs = sizes['blocks'] * walk.groups * walk.batch
    span = -(-carries.tiles // max(1, _PROGRAMS // programs))
    spans = -(-carries.tiles // span)
    rows = sizes['R'] + sizes['N'] + 2
    ranks = triton.next_power_of_2(max(1, sizes['R']))
    sums = walk.u.new_empty(walk.batch * spans, walk.routes, rows, sizes['dim'],
                            dtype=torch.float32)
    if walk.project:
        grad_delta = grad_B = grad_C = parts
    else:
        grad_B, grad_C = parts
    scan_tiles_backward[(programs * spans,)](
        walk.u, *walk.u_strides, walk.delta, *walk.delta_strides, walk.B, walk.C,
        *walk.c_strides, grad, *grad_strides, grad_u, grad_delta, *out_strides, grad_B,
        grad_C, grad_B.stride(0), walk.A, walk.weight, walk.bias,
        walk.bias if walk.skip is None else walk.skip, carries.states, carries.grads, sums,
        **sizes, RP=max(16, ranks), RS=min(8, ranks), PRECISION=_precision(), spans=spans,
        span=span, stride_d=1, SKIP=walk.skip is not None, ADD=add, **options)
    return sums.sum(0)
