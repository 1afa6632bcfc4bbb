"""``mamba_inner`` by CUDA kernels: convolutions, scans and gate, and cuBLASLt's products between.

Both directions go through one launch of each. Maps are (B, L, D), the layout that the products
leave. What depends on sizes and dtypes alone is worked out once; a call deals in addresses within
one piece of memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.causal_conv import cuda as conv
from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.launch import (
    TYPES,
    Instance,
    Slab,
    cached,
    kernel,
    pointer,
    why_not_beside,
)
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.selective_scan import cuda_scan as scans
from vmamba_mm.ops.selective_scan.cuda_scan import RowStrides, Strides, Types


def gate_instance(type_: str, vector: bool, backward: bool) -> Instance:
    return Instance('scan1d/scan1d_gate.cu',
                    f'scan1d_gate<{type_}, {4 if vector else 1}, {str(backward).lower()}>')


#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    gate_instance(type_, vector, backward): 80 if type_ == 'BFloat' else 75
    for type_, vector in (('Half', True), ('BFloat', True), ('Float', False))
    for backward in (False, True)}


def why_not(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale
            ) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if conv_weight.shape[2] not in conv.TAPS:
        return (f'{conv_weight.shape[2]} taps; the kernels take {conv.TAPS[0]} to {conv.TAPS[-1]}')
    return (why_not_beside(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
            or scan_kernels.why_not(xz, 0, 1)
            or why_not_here(xz.device.index, xz.dtype, A.shape[2]) or gemm.why_not())


@torch.compiler.assume_constant_result
def why_not_here(index: int, dtype: torch.dtype, state: int) -> str | None:
    """The reason why the GPU ``index`` cannot run the kernels on such maps, or None."""
    return scans.why_not_on(index, dtype, state)


#: the parameters of a direction as the launches call them
PARAMETERS = ('conv_weight', 'conv_bias', 'x_proj', 'dt_proj', 'dt_bias', 'A', 'D')


class Sizes(NamedTuple):
    batch: int
    length: int
    dim: int
    routes: int
    taps: int
    rank: int
    state: int
    xz_b: int  # elements from a sample to the next, and from a position
    xz_l: int


class Dtypes(NamedTuple):
    """Of the map and the parameters; None for a bias that there is not."""
    map: torch.dtype
    conv_weight: torch.dtype
    conv_bias: torch.dtype | None
    dt_bias: torch.dtype
    A: torch.dtype
    D: torch.dtype
    #: of the gradients by x_proj and dt_proj, as the products give them
    x_proj: torch.dtype = torch.float32
    dt_proj: torch.dtype = torch.float32


def projected_pitch(width: int) -> int:
    """Elements from a position of dt, B and C to the next: rows at multiples of 16 bytes, for the
    products."""
    return _round_up(width)


def _round_up(size: int) -> int:
    return -(-size // 8) * 8


class _Mixer:
    """The launches that forward and backward share."""

    def __init__(self, index: int, sizes: Sizes, dtypes: Dtypes, reverse: bool):
        self.index, self.sizes, self.dtypes = index, sizes, dtypes
        batch, length, dim, routes, taps, rank, state, xz_b, xz_l = sizes
        self.dtype, self.size = dtypes.map, dtypes.map.itemsize
        self.rows, self.width = batch * length, rank + 2 * state
        self.pitch = projected_pitch(self.width)
        self.of_map = self.rows * dim
        self.directions = conv.BOTH if routes == 2 else conv.BACKWARD if reverse else conv.FORWARD
        self.conv_sizes = conv.Sizes(batch, length, dim, taps)
        self.x_strides = conv.Strides(0, xz_b, xz_l, 1)
        self.map_strides = conv.Strides(self.of_map, length * dim, dim, 1)
        self.conv_vector = not (dim | xz_b | xz_l) % 2
        self.convolve = conv.forward_launch(
            index, self.dtype, self.conv_sizes, self.directions, self.x_strides, self.map_strides,
            dtypes.conv_weight, dtypes.conv_bias, True, self.conv_vector)
        self.workspace_size = 0
        self.project = self.product(self.rows, self.width, dim, right_t=True,
                                    pitches=(0, 0, self.pitch))
        self.find_delta = self.product(self.rows, dim, rank, right_t=True,
                                       pitches=(self.pitch, 0, 0))
        self.scan_sizes = scans.Sizes(batch, routes, dim, length, state,
                                      2 if routes == 2 else int(reverse))
        self.types = Types(dtypes.A, dtypes.D, dtypes.dt_bias)
        self.u = Strides(length * dim, self.of_map, dim)
        self.z = Strides(xz_b, 0, xz_l)
        self.BC = RowStrides(length * self.pitch, self.rows * self.pitch, 1, self.pitch)

    def product(self, *sizes, out_dtype=None, **kwargs) -> Callable[..., None]:
        product = gemm.product(self.index, self.dtype, out_dtype or self.dtype, *sizes,
                               batch=self.sizes.routes, **kwargs)
        self.workspace_size = max(self.workspace_size, product.workspace)
        return product.run

    def gate(self, backward: bool, scale: float, **strides: int) -> Callable[..., None]:
        return gate_launch(self.index, self.sizes, self.dtype, backward, scale, **strides)


@cached
def gate_launch(index: int, sizes: Sizes, dtype: torch.dtype, backward: bool, scale: float,
                dz_b: int = 0, dz_l: int = 0) -> Callable[..., None]:
    """The sum of the directions, and the gate; or its backward.

    It takes the addresses ``ys`` (K, B, L, D), ``z``, ``sum`` (or null) and ``out``; the backward
    ``grad``, ``sum``, ``z``, ``out`` for the gradient by the sum, and ``dz``.
    """
    of_map = sizes.batch * sizes.length * sizes.dim
    vector = not (sizes.dim | sizes.xz_b | sizes.xz_l) % 4
    return kernel(index, gate_instance, TYPES[dtype], vector, backward).bind(
        (-(-of_map // (1024 if vector else 256)), 1, 1), (256, 1, 1), z_b=sizes.xz_b,
        z_l=sizes.xz_l, dz_b=dz_b, dz_l=dz_l, batch=sizes.batch, length=sizes.length,
        dim=sizes.dim, routes=sizes.routes, scale=scale)


class _Forward(NamedTuple):
    run: Callable[..., None]
    memory: int


@cached
def forward_launch(index: int, sizes: Sizes, dtypes: Dtypes, reverse: bool, scale: float,
                    save: bool) -> _Forward:
    """The forward. It takes the addresses of xz, the parameters (``x_proj`` and ``dt_proj`` in the
    dtype of the map), y, memory, and with ``save`` of projected and total."""
    mixer = _Mixer(index, sizes, dtypes, reverse)
    of_map, size, routes = mixer.of_map, mixer.size, sizes.routes
    gated = routes == 1 and scale == 1 and not save  # by the scan itself
    scan = scans.forward_launch(
        index, mixer.dtype, mixer.scan_sizes, True, mixer.types, True,
        (('u', mixer.u), ('delta', mixer.u), ('z', mixer.z), ('y', mixer.u)), mixer.BC, mixer.BC,
        mixer.dtype)
    gate = None if gated else mixer.gate(False, scale)
    slab = Slab()
    u_at, delta_at = slab.take(routes * of_map, size), slab.take(routes * of_map, size)
    y_at = 0 if gated else slab.take(routes * of_map, size)
    projected_at = 0 if save else slab.take(routes * mixer.rows * mixer.pitch, size)
    workspace_at, scan_at = slab.take(mixer.workspace_size, 1), slab.take(scan.memory, 1)
    B_at, C_at = sizes.rank * size, (sizes.rank + sizes.state) * size
    z_at = sizes.dim * size

    def launch_forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, y, memory,
                       projected=0, total=0):
        u, delta, workspace = memory + u_at, memory + delta_at, memory + workspace_at
        projected = projected or memory + projected_at
        mixer.convolve(x_data=xz, y_data=u, weight=conv_weight, bias=conv_bias)
        mixer.project(u, x_proj, projected, workspace)
        mixer.find_delta(projected, dt_proj, delta, workspace)
        inputs = dict(u=u, delta=delta, A=A, B=projected + B_at, C=projected + C_at, D=D,
                      bias=dt_bias, memory=memory + scan_at)
        if gated:
            scan.run(y=y, z=xz + z_at, **inputs)
        else:
            scan.run(y=memory + y_at, **inputs)
            gate(ys=memory + y_at, z=xz + z_at, sum=total, out=y)

    return _Forward(launch_forward, slab.size)


@cached
def backward_launch(index: int, sizes: Sizes, dtypes: Dtypes, reverse: bool, scale: float,
                    wide: bool = False) -> _Forward:
    """The backward. It takes the addresses of grad, xz, the parameters as the forward, projected
    and total of the forward, dxz (B, L, 2*D), the gradients by the parameters, and memory.

    With ``wide`` the gradients by x_proj and dt_proj have room for the next multiples of 8: they
    are (K, R+2N, D) and (K, D, R) with some rows or columns more, of which the values mean nothing.
    cuBLASLt sums over all positions ten times as fast at such sizes as at R = 3.
    """
    mixer = _Mixer(index, sizes, dtypes, reverse)
    batch, length, dim, routes, _, rank, state, *_ = sizes
    of_map, size, rows = mixer.of_map, mixer.size, mixer.rows
    width, pitch = mixer.width, mixer.pitch
    of_grad = Strides(length * dim, 0, dim)
    scan = scans.backward_launch(
        index, mixer.dtype, mixer.scan_sizes, True, mixer.types, True,
        (('u', mixer.u), ('delta', mixer.u), ('grad', of_grad), ('du', mixer.u),
         ('ddelta', mixer.u)),
        mixer.BC, mixer.BC, mixer.BC, mixer.BC, (mixer.dtype, mixer.dtype), False)
    gate = mixer.gate(True, scale, dz_b=length * 2 * dim, dz_l=2 * dim)
    by_dt = mixer.product(rows, rank, dim, pitches=(0, 0, pitch))
    by_dt_proj = mixer.product(dim, _round_up(rank) if wide else rank, rows, left_t=True,
                               pitches=(0, pitch, 0), out_dtype=dtypes.dt_proj)
    by_x_proj = mixer.product(pitch if wide else width, dim, rows, left_t=True,
                              pitches=(pitch, 0, 0), out_dtype=dtypes.x_proj)
    by_u = mixer.product(rows, dim, width, pitches=(pitch, 0, 0))
    dx_strides = conv.Strides(0, length * 2 * dim, 2 * dim, 1)
    partials, conv_backward = conv.backward_launch(
        index, mixer.dtype, mixer.conv_sizes, mixer.directions, mixer.x_strides,
        mixer.map_strides, mixer.map_strides, dx_strides, dtypes.conv_weight, dtypes.conv_bias,
        True, mixer.conv_vector)
    slab = Slab()
    maps = [slab.take(routes * of_map, size) for _ in range(5)]
    by_total_at = slab.take(of_map, size)
    by_projected_at = slab.take(routes * rows * pitch, size)
    partials_at, workspace_at = slab.take(partials), slab.take(mixer.workspace_size, 1)
    scan_at = slab.take(scan.memory, 1)
    B_at, C_at, z_at = rank * size, (rank + state) * size, dim * size

    def launch_backward(grad, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, projected,
                        total, dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD,
                        memory):
        u, delta, du, ddelta, more = [memory + at for at in maps]
        by_total, by_projected = memory + by_total_at, memory + by_projected_at
        workspace = memory + workspace_at
        gate(z=xz + z_at, grad=grad, sum=total, out=by_total, dz=dxz + z_at)
        mixer.convolve(x_data=xz, y_data=u, weight=conv_weight, bias=conv_bias)
        mixer.find_delta(projected, dt_proj, delta, workspace)
        scan.run(u=u, delta=delta, A=A, B=projected + B_at, C=projected + C_at, D=D, bias=dt_bias,
                 grad=by_total, du=du, ddelta=ddelta, dA=dA, dB=by_projected + B_at,
                 dC=by_projected + C_at, dD=dD, dbias=ddt_bias, memory=memory + scan_at)
        by_dt(ddelta, dt_proj, by_projected, workspace)
        by_dt_proj(ddelta, projected, ddt_proj, workspace)
        by_x_proj(by_projected, u, dx_proj, workspace)
        by_u(by_projected, x_proj, more, workspace)
        conv_backward(x=xz, dy=du, more=more, dx=dxz, weight=conv_weight, bias=conv_bias,
                      dweight=dconv_weight, dbias=dconv_bias, partials=memory + partials_at)

    return _Forward(launch_backward, slab.size)


# --- on tensors -------------------------------------------------------------------------------

def _start(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D):
    """Inputs without gaps, the factors of products in the dtype of the map; sizes; dtypes."""
    dtype = xz.dtype
    alignment = 16 // dtype.itemsize
    batch, length, _ = xz.shape
    stride_b, stride_l, stride_d = xz.stride()
    if stride_d != 1 or (stride_b | stride_l) % alignment or xz.data_ptr() % 16:
        xz = xz.clone(memory_format=torch.contiguous_format)
        stride_b, stride_l, _ = xz.stride()
    factors = cast((x_proj, dt_proj), dtype) if dtype != torch.float32 else [
        t.to(dtype).contiguous() for t in (x_proj, dt_proj)]
    factors = [t if t.data_ptr() % 16 == 0 else t.clone() for t in factors]
    parameters = [None if t is None else t.contiguous()
                  for t in (conv_weight, conv_bias, dt_bias, A, D)]
    routes, dim, taps = conv_weight.shape
    sizes = Sizes(batch, length, dim, routes, taps, dt_proj.shape[2], A.shape[2], stride_b,
                   stride_l)
    dtypes = Dtypes(dtype, *[None if t is None else t.dtype for t in parameters])
    conv_weight, conv_bias, dt_bias, A, D = parameters
    return sizes, dtypes, dict(xz=xz, conv_weight=conv_weight, conv_bias=conv_bias,
                               x_proj=factors[0], dt_proj=factors[1], dt_bias=dt_bias, A=A, D=D)


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: pointer(t) for name, t in tensors.items()}


def forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale, save
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.mamba_inner`. With ``save`` also what the backward takes:
    nothing, the projections (K, B * L, R + 2N and a gap), and the sum of the directions before
    the gate."""
    sizes, dtypes, tensors = _start(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    launch = forward_launch(xz.get_device(), sizes, dtypes, reverse, scale, save)
    shape = sizes.batch, sizes.length, sizes.dim
    rows, pitch = sizes.batch * sizes.length, projected_pitch(x_proj.shape[1])
    y = xz.new_empty(shape)
    projected = xz.new_empty((sizes.routes, rows, pitch) if save else 0)
    total = xz.new_empty(shape if save else 0)
    memory = xz.new_empty(launch.memory, dtype=torch.uint8)
    saved = dict(projected=projected.data_ptr(), total=total.data_ptr()) if save else {}
    launch.run(**_addresses(tensors), y=y.data_ptr(), memory=memory.data_ptr(), **saved)
    return y, xz.new_empty(0), projected, total


def backward(grad, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, convolved,
             projected, total, reverse, scale):
    """Gradients by xz and the parameters (None where there is none)."""
    inputs = xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
    sizes, dtypes, tensors = _start(*inputs)
    dtype = xz.dtype
    products = [t.dtype if t.dtype in (dtype, torch.float32) else torch.float32
                for t in (x_proj, dt_proj)]
    dtypes = dtypes._replace(x_proj=products[0], dt_proj=products[1])
    width, rank = x_proj.shape[1], dt_proj.shape[2]
    wide = bool((width | rank) % 8)
    launch = backward_launch(xz.get_device(), sizes, dtypes, reverse, scale, wide)
    grad = grad.to(dtype).contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()

    def empty(like, dtype=None):
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=xz.device)

    dx_proj = xz.new_empty((sizes.routes, _round_up(width), sizes.dim), dtype=products[0])
    ddt_proj = xz.new_empty((sizes.routes, sizes.dim, _round_up(rank)), dtype=products[1])
    grads = dict(
        dxz=empty(xz), dconv_weight=empty(conv_weight),
        dconv_bias=None if conv_bias is None else empty(conv_bias), dx_proj=dx_proj,
        ddt_proj=ddt_proj, ddt_bias=empty(dt_bias), dA=empty(A), dD=empty(D))
    memory = xz.new_empty(launch.memory, dtype=torch.uint8)
    launch.run(grad=grad.data_ptr(), projected=projected.data_ptr(), total=total.data_ptr(),
               memory=memory.data_ptr(), **_addresses(tensors), **_addresses(grads))
    if wide:
        grads |= dict(dx_proj=dx_proj[:, :width].contiguous(),
                      ddt_proj=ddt_proj[..., :rank].contiguous())
    return tuple([g if g is None or g.dtype == t.dtype else g.to(t.dtype)
                  for g, t in zip(grads.values(), inputs, strict=True)])
