"""Launches of the Triton kernels: the arguments of a route, and what its tiles carry."""

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


class AxisScan(NamedTuple):
    """The route along one axis of a map and (``directions`` 2) its reverse, for a launch.

    ``u`` is the map. ``delta``, ``B`` and ``C`` are tensors of their own, B and C (batch, K, N, L)
    without gaps, or (``project``) the same one, which has the R numbers of dt, N of B and N of C
    side by side for each route. Strides are of (batch, line, step, channel), in elements.
    In fp32: ``A`` (K, N, D), ``weight`` (K, R, D), ``bias`` (K, D), ``skip`` (groups, D) or None.
    """
    u: Tensor
    u_strides: tuple[int, ...]
    delta: Tensor
    delta_strides: tuple[int, ...]
    B: Tensor
    C: Tensor
    A: Tensor
    weight: Tensor
    bias: Tensor
    skip: Tensor | None
    batch: int
    groups: int
    length: int
    line_length: int
    first_route: int
    directions: int
    project: bool
    softplus: bool

    @property
    def routes(self) -> int:
        return self.A.shape[0]

    def inputs(self) -> dict:
        """The arguments for the tensors that all kernels but :func:`chain_tiles` read."""
        return dict(**strided('u', self.u, self.u_strides),
                    **strided('delta', self.delta, self.delta_strides, 'v'), B=self.B, C=self.C,
                    A=self.A, weight=self.weight, bias=self.bias)

    def sizes(self, tile: int) -> tuple[dict, dict]:
        """The arguments of a launch that are numbers, and its options."""
        _, state, dim = self.A.shape
        if tile > self.line_length:
            wraps = 2
        else:
            wraps = int(self.line_length < self.length)
        width, options = channel_block(dim)
        numbers = dict(groups=self.groups, dim=dim, length=self.length,
                       line_length=self.line_length, tiles=-(-self.length // tile),
                       blocks=-(-dim // width), first_route=self.first_route, routes=self.routes,
                       N=state, R=self.weight.shape[1], T=tile, BD=width,
                       DIRECTIONS=self.directions, WRAPS=wraps, PROJECT=self.project,
                       SOFTPLUS=self.softplus)
        return numbers, options


def strided(name: str, tensor: Tensor, strides: tuple[int, ...], letter: str | None = None) -> dict:
    """The arguments for a map: the tensor, and the strides that begin with ``letter``."""
    names = (f'{letter or name}_{stride}' for stride in ('b', 'line', 'step', 'd'))
    return {name: tensor, **dict(zip(names, strides, strict=True))}


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, as TRITON_INTERPRET said at import."""
    return not isinstance(scan_tiles, triton.runtime.JITFunction)


@functools.cache
def _precision() -> str:
    """Triton's name of products of fp32 tiles in fp32's precision: on NVIDIA GPUs they are three
    products of tensor cores."""
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
    """A context in which the tensor's device is the current one, on which Triton launches."""
    if tensor.device.type == 'cpu':
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


class Carries:
    """The states, and for the backward the gradients, that enter each tile of every route."""

    def __init__(self, scan: AxisScan, tile: int, with_grad: bool):
        state, dim = scan.A.shape[1:]
        self.tile, self.tiles = tile, -(-scan.length // tile)
        empty = scan.u.new_empty
        shape = (scan.batch, scan.routes, state, self.tiles, dim)
        if self.tiles == 1:  # nothing is carried; the kernels want a pointer
            self.states = self.grads = self.totals = empty(1, dtype=torch.float32)
            return
        self.totals = empty(scan.batch, scan.routes, self.tiles, dim, dtype=torch.float32)
        self.states = empty(shape, dtype=torch.float32)
        self.grads = empty(shape if with_grad else 1, dtype=torch.float32)

    def summarise(self, scan: AxisScan, grad: Tensor | None = None,
                  grad_strides: tuple[int, ...] = (0,) * 4) -> None:
        """Calculate what each tile alone hands on to the next."""
        if self.tiles > 1:
            sizes, options = scan.sizes(self.tile)
            grid = (sizes['blocks'] * self.tiles * scan.groups * scan.batch,)
            summarise_tiles[grid](
                **scan.inputs(), **strided('grad', scan.u if grad is None else grad, grad_strides,
                                           'g'),
                totals=self.totals, states=self.states, grads=self.grads, **sizes,
                GRAD=grad is not None, **options)

    def chain(self, scan: AxisScan, with_grad: bool) -> None:
        """Turn what each tile hands on alone into what enters each."""
        if self.tiles > 1:
            sizes, options = scan.sizes(self.tile)
            names = ('dim', 'tiles', 'blocks', 'routes', 'N', 'BD')
            grid = (sizes['blocks'] * scan.A.shape[1] * scan.routes * scan.batch, 1 + with_grad)
            chain_tiles[grid](
                self.totals, self.states, self.grads, scan.A,
                stride_d=1, reversed_from=2 if scan.project else scan.routes,
                **{name: sizes[name] for name in names}, U=2 if interpreted() else 16, **options)


def scan_forward(scan: AxisScan, carries: Carries, y: Tensor, y_strides: tuple[int, ...],
                 partial: Tensor | None) -> None:
    """Write the sum of the route and its reverse to ``y``, and ``partial`` (fp32, of the same
    strides) added to it."""
    sizes, options = scan.sizes(carries.tile)
    grid = (sizes['blocks'] * carries.tiles * scan.groups * scan.batch,)
    scan_tiles[grid](
        **scan.inputs(), **strided('y', y, y_strides), partial=partial, skip=scan.skip,
        states=carries.states, **sizes, **options)


def scan_backward(scan: AxisScan, carries: Carries, grad: Tensor, grad_strides: tuple[int, ...],
                  grad_u: Tensor, grad_delta: Tensor | None, out_strides: tuple[int, ...],
                  add: bool, parts: Tensor) -> Tensor:
    """Write the gradients of maps, or add to ``grad_u``; return (K, R + N + 2, D), the gradients by
    the weight, A, the bias and the skip.

    Args:
        grad_delta: None of projected dt.
        out_strides: of ``grad_u`` and ``grad_delta``.
        add: whether to add to ``grad_u``.
        parts: a partial sum for each of P blocks of channels: (P, *delta.shape) of projections,
            else (2, P, *B.shape), the gradients by B and C.
    """
    sizes, options = scan.sizes(carries.tile)
    programs = sizes['blocks'] * scan.groups * scan.batch
    span = -(-carries.tiles // max(1, _PROGRAMS // programs))
    spans = -(-carries.tiles // span)
    rows = sizes['R'] + sizes['N'] + 2
    ranks = triton.next_power_of_2(max(1, sizes['R']))
    sums = scan.u.new_empty(scan.batch * spans, scan.routes, rows, sizes['dim'],
                            dtype=torch.float32)
    if scan.project:
        grad_delta = grad_B = grad_C = parts
    else:
        grad_B, grad_C = parts
    scan_tiles_backward[(programs * spans,)](
        **scan.inputs(), **strided('grad', grad, grad_strides, 'g'),
        **strided('grad_u', grad_u, out_strides, 'x'), grad_delta=grad_delta, grad_B=grad_B,
        grad_C=grad_C, part_stride=grad_B.stride(0), skip=scan.skip, states=carries.states,
        grads=carries.grads, sums=sums, spans=spans, span=span, stride_d=1, **sizes, ADD=add,
        RP=max(16, ranks), RS=min(8, ranks), PRECISION=_precision(), **options)
    return sums.sum(0)
