"""``spatial_mixer`` and ``channel_mixer`` by the CUDA kernels of ``shift_mix``, ``bi_wkv``,
``squared_relu`` and ``sigmoid_gate``, and cuBLASLt's products between.

What depends on sizes and dtypes alone is worked out once; a call deals in addresses, so that what
is launched for a mixer can be replayed as one CUDA graph. The forward keeps the mixtures, what the
products give and the WKV; the rest is calculated again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import TYPES, Slab, aligned, cached, why_not_beside
from vmamba_mm.ops.fused.cast import cast_launch
from vmamba_mm.ops.fused.channels import SumJob, sum_launch
from vmamba_mm.ops.fused.gates import cuda as gates
from vmamba_mm.ops.shift_mix import cuda as shifts
from vmamba_mm.ops.wkv import cuda as wkv
from vmamba_mm.ops.wkv import cuda_launch as wkv_launches

_BLOCKS, _EPS = 32, 1e-6  # of the official mode, as bi_wkv has them by default
_SINGLE = torch.float32


def _why_not(x: Tensor, weights, dtype: torch.dtype) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels around the WKV'
    if dtype not in TYPES or any(size % 4 for weight in weights for size in weight.shape):
        return 'a product is not of multiples of 4'
    return why_not_beside(x, *weights) or gemm.why_not()


def spatial_why_not(x, for_k, for_v, for_r, key, value, receptance, output, w, u, official, pixels,
                    share, dtype) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    tokens = x.flatten(1, 2)
    return (_why_not(x, (key, value, receptance, output), dtype)
            or shifts.why_not(x, for_k, for_v, for_r, pixels, share, x.shape[-1], dtype)
            or wkv.bi_why_not(w, u, tokens, tokens, _BLOCKS * official, _EPS))


def channel_why_not(x, for_k, for_r, key, value, receptance, pixels, share, head_dim, dtype
                    ) -> str | None:
    return (_why_not(x, (key, value, receptance), dtype)
            or shifts.why_not(x, for_k, for_r, None, pixels, share, head_dim, dtype))


# --- launches ---------------------------------------------------------------------------------

class Sizes(NamedTuple):
    """Of the map; of what the products to k and from it give; pixels, share and head_dim of the
    shift."""
    batch: int
    height: int
    width: int
    dim: int
    inner: int
    out: int
    pixels: int
    share: float
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


class Dtypes(NamedTuple):
    """Of the map that comes in, the products, the shares and the weights."""
    x: torch.dtype
    map: torch.dtype
    shares: tuple[torch.dtype | None, ...]
    weights: tuple[torch.dtype, ...]


def _lay_out(widths: Sequence[int], sizes: Sizes, itemsize: int) -> tuple[list[int], int]:
    """Where maps of so many channels begin in a piece of memory, in bytes, and its size."""
    slab = Slab()
    return [slab.take(sizes.rows * width, itemsize) for width in widths], slab.size


def _saved_of_spatial(sizes: Sizes, itemsize: int) -> tuple[list[int], int]:
    """Of the mixtures for k, v and r, of k, v and r, and of the WKV."""
    return _lay_out([sizes.dim] * 3 + [sizes.inner] * 4, sizes, itemsize)


def _saved_of_channel(sizes: Sizes, itemsize: int) -> tuple[list[int], int]:
    """Of the mixtures for k and r, of k and r, and of what the gate multiplies."""
    return _lay_out([sizes.dim, sizes.dim, sizes.inner, sizes.out, sizes.out], sizes, itemsize)


class _Launches:
    """What the launches of both mixers share.

    Args:
        shapes: of the weights.
    """

    def __init__(self, index: int, sizes: Sizes, dtypes: Dtypes, tf32: bool,
                 shapes: tuple[tuple[int, int], ...]):
        self.index, self.sizes, self.dtypes, self.tf32 = index, sizes, dtypes, tf32
        self.dtype = dtypes.map
        self.slab, self.workspace_size = Slab(), 0
        self._cast = None
        if any(dtype != self.dtype for dtype in dtypes.weights):
            counts = tuple([height * width for height, width in shapes])
            starts, self._cast = cast_launch(index, self.dtype, counts, dtypes.weights)
            at = self.slab.take(starts[-1], self.dtype.itemsize)
            self._weights_at = [at + start * self.dtype.itemsize for start in starts[:-1]]

    def take(self, width: int) -> int:
        """A part of the slab for a map of so many channels."""
        return self.slab.take(self.sizes.rows * width, self.dtype.itemsize)

    def take_workspace(self) -> None:
        """Of the products, when all are known."""
        self.workspace_at = self.slab.take(self.workspace_size, 1)

    def product(self, *sizes: int, out_dtype: torch.dtype | None = None, **kwargs
                ) -> Callable[..., None]:
        product = gemm.product(self.index, self.dtype, out_dtype or self.dtype, *sizes,
                               tf32=self.tf32, **kwargs)
        self.workspace_size = max(self.workspace_size, product.workspace)
        return product.run

    def shift(self, direction: str) -> tuple[int, Callable[..., None]]:
        sizes, dtypes = self.sizes, self.dtypes
        return shifts.shift_launch(self.index, direction, dtypes.x, dtypes.map, sizes[:4],
                                   sizes.pixels, sizes.share, sizes.head_dim, dtypes.shares)

    def gate(self, kind: int, backward: bool, width: int) -> Callable[..., None]:
        return gates.gates_launch(self.index, self.dtype, kind, backward, self.sizes.rows * width)

    def halved(self, weights: Sequence[int], slab: int) -> Sequence[int]:
        """The weights in the dtype of the products."""
        if self._cast is None:
            return weights
        self._cast(weights, slab + self._weights_at[0])
        return [slab + at for at in self._weights_at]

    def prepare_shift_backward(self) -> None:
        parts, self.shift_backward = self.shift('bwd')
        width = shifts.MOST * self.sizes.dim
        self.parts_at = self.slab.take(parts * width)
        self.sum = sum_launch(self.index, SumJob(parts, 0, width, None, _SINGLE))

    def run_shift_backward(self, x: int, shares: Sequence[int], grads: tuple[int, ...], dx: int,
                           dshares: int, slab: int) -> None:
        parts = slab + self.parts_at
        self.shift_backward(x=x, shares=shares, y=grads, dx=dx, partials=parts)
        self.sum((parts, 0, dshares))


class _Spatial(_Launches):
    def __init__(self, index, sizes, dtypes, tf32, decay_dtypes, official):
        square, last = (sizes.inner, sizes.dim), (sizes.out, sizes.inner)
        super().__init__(index, sizes, dtypes, tf32, (square,) * 3 + (last,))
        self.saved, self.saved_size = _saved_of_spatial(sizes, self.dtype.itemsize)
        self.wkv_key = (wkv_launches.Types(self.dtype, *decay_dtypes),
                        wkv_launches.Sizes(sizes.batch, sizes.tokens, sizes.inner))
        self.strides = wkv_launches.Strides(sizes.tokens * sizes.inner, sizes.inner, 1)
        self.official = official


class _SpatialForward(_Spatial):
    def __init__(self, *args):
        super().__init__(*args)
        sizes, maps = self.sizes, (self.strides,) * 2
        _, self.mix = self.shift('fwd')
        self.project = self.product(sizes.rows, sizes.inner, sizes.dim, right_t=True)
        if self.official:
            self.wkv = wkv_launches.official_forward_launch(self.index, *self.wkv_key, *maps,
                                                            _BLOCKS, _EPS)
        else:
            self.wkv = wkv_launches.forward_launch(self.index, *self.wkv_key, *maps, False)
        self.sigmoid_gate = self.gate(gates.SIGMOID_GATE, False, sizes.inner)
        self.project_out = self.product(sizes.rows, sizes.out, sizes.inner, right_t=True)
        self.gated_at, self.memory_at = self.take(sizes.inner), self.slab.take(self.wkv.memory, 1)
        self.take_workspace()

    def launch(self, saved, slab, result, w, u, x, *parameters):
        shares, weights = parameters[:3], self.halved(parameters[3:], slab)
        *mixtures, k, v, r, y = [saved + at for at in self.saved]
        gated, workspace = slab + self.gated_at, slab + self.workspace_at
        self.mix(x=x, shares=shares, y=tuple(mixtures))
        for mixed, weight, projected in zip(mixtures, weights[:3], (k, v, r), strict=True):
            self.project(mixed, weight, projected, workspace)
        self.wkv.run(k=k, v=v, w=w, u=u, y=y, memory=slab + self.memory_at)
        self.sigmoid_gate(x=r, other=y, grad=0, y=gated, dother=0)
        self.project_out(gated, weights[3], result, workspace)


class _SpatialBackward(_Spatial):
    def __init__(self, *args):
        super().__init__(*args)
        sizes, maps = self.sizes, (self.strides,) * 3
        rows, dim, inner, out = sizes.rows, sizes.dim, sizes.inner, sizes.out
        *projecting, last = [_of_gradient(dtype, self.dtype) for dtype in self.dtypes.weights]
        self.by_gated = self.product(rows, inner, out)
        self.by_output = self.product(out, inner, rows, left_t=True, out_dtype=last)
        self.by_mixed = self.product(rows, dim, inner)
        self.by_weights = [self.product(inner, dim, rows, left_t=True, out_dtype=dtype)
                           for dtype in projecting]
        self.sigmoid_gate, self.sigmoid_gate_backward = (
            self.gate(gates.SIGMOID_GATE, backward, inner) for backward in (False, True))
        if self.official:
            self.wkv = wkv_launches.official_backward_launch(self.index, *self.wkv_key, *maps,
                                                             _BLOCKS, _EPS)
        else:
            self.wkv = wkv_launches.backward_launch(self.index, *self.wkv_key, *maps, False)
        # What the gate gives, and the gradient by it; by r and the WKV, by k and v, by mixtures.
        self.maps_at = [self.take(width) for width in [inner] * 6 + [dim] * 3]
        self.memory_at = self.slab.take(self.wkv.memory, 1)
        self.prepare_shift_backward()
        self.take_workspace()

    def launch(self, saved, slab, grad, dx, dshares, dw, du, w, u, dweights, x, *parameters):
        shares, weights = parameters[:3], self.halved(parameters[3:], slab)
        *mixtures, k, v, r, y = [saved + at for at in self.saved]
        gated, by_gated, dr, dy, dk, dv, *by_mixtures = [slab + at for at in self.maps_at]
        workspace = slab + self.workspace_at
        self.sigmoid_gate(x=r, other=y, grad=0, y=gated, dother=0)
        self.by_output(grad, gated, dweights[3], workspace)
        self.by_gated(grad, weights[3], by_gated, workspace)
        self.sigmoid_gate_backward(x=r, other=y, grad=by_gated, y=dr, dother=dy)
        self.wkv.run(k=k, v=v, dy=dy, w=w, u=u, dk=dk, dv=dv, dw=dw, du=du,
                     memory=slab + self.memory_at)
        for product, by, mixed, weight, dweight, by_mixed in zip(
                self.by_weights, (dk, dv, dr), mixtures, weights[:3], dweights[:3], by_mixtures,
                strict=True):
            product(by, mixed, dweight, workspace)
            self.by_mixed(by, weight, by_mixed, workspace)
        self.run_shift_backward(x, shares, tuple(by_mixtures), dx, dshares, slab)


class _Channel(_Launches):
    def __init__(self, index, sizes, dtypes, tf32):
        super().__init__(index, sizes, dtypes, tf32, (
            (sizes.inner, sizes.dim), (sizes.out, sizes.inner), (sizes.out, sizes.dim)))
        self.saved, self.saved_size = _saved_of_channel(sizes, self.dtype.itemsize)
        self.squared_relu = self.gate(gates.SQUARED_RELU, False, sizes.inner)


class _ChannelForward(_Channel):
    def __init__(self, *args):
        super().__init__(*args)
        rows, dim, inner, out = self.sizes.rows, *self.sizes[3:6]
        _, self.mix = self.shift('fwd')
        self.find_k, self.find_values, self.find_r = (
            self.product(rows, columns, width, right_t=True)
            for columns, width in ((inner, dim), (out, inner), (out, dim)))
        self.sigmoid_gate = self.gate(gates.SIGMOID_GATE, False, out)
        self.squared_at = self.take(inner)
        self.take_workspace()

    def launch(self, saved, slab, result, x, *parameters):
        shares, (key, value, receptance) = parameters[:2], self.halved(parameters[2:], slab)
        mixed_k, mixed_r, k, r, values = [saved + at for at in self.saved]
        squared, workspace = slab + self.squared_at, slab + self.workspace_at
        self.mix(x=x, shares=(*shares, 0), y=(mixed_k, mixed_r, 0))
        self.find_k(mixed_k, key, k, workspace)
        self.find_r(mixed_r, receptance, r, workspace)
        self.squared_relu(x=k, other=0, grad=0, y=squared, dother=0)
        self.find_values(squared, value, values, workspace)
        self.sigmoid_gate(x=r, other=values, grad=0, y=result, dother=0)


class _ChannelBackward(_Channel):
    def __init__(self, *args):
        super().__init__(*args)
        rows, dim, inner, out = self.sizes.rows, *self.sizes[3:6]
        of_key, of_value, of_receptance = [_of_gradient(dtype, self.dtype)
                                           for dtype in self.dtypes.weights]
        self.by_key, self.by_value, self.by_receptance = (
            self.product(*sizes, rows, left_t=True, out_dtype=dtype) for sizes, dtype in (
                ((inner, dim), of_key), ((out, inner), of_value), ((out, dim), of_receptance)))
        self.by_squared = self.product(rows, inner, out)
        self.by_mixed_k, self.by_mixed_r = (self.product(rows, dim, width)
                                            for width in (inner, out))
        self.sigmoid_gate_backward = self.gate(gates.SIGMOID_GATE, True, out)
        self.squared_relu_backward = self.gate(gates.SQUARED_RELU, True, inner)
        # By r and the values, the square, by it and by k, by the mixtures.
        self.maps_at = [self.take(width) for width in (out, out, inner, inner, inner, dim, dim)]
        self.prepare_shift_backward()
        self.take_workspace()

    def launch(self, saved, slab, grad, dx, dshares, dweights, x, *parameters):
        shares, (key, value, receptance) = parameters[:2], self.halved(parameters[2:], slab)
        mixed_k, mixed_r, k, r, values = [saved + at for at in self.saved]
        dr, dvalues, squared, by_squared, dk, by_mixed_k, by_mixed_r = [
            slab + at for at in self.maps_at]
        workspace, (dkey, dvalue, dreceptance) = slab + self.workspace_at, dweights
        self.sigmoid_gate_backward(x=r, other=values, grad=grad, y=dr, dother=dvalues)
        self.squared_relu(x=k, other=0, grad=0, y=squared, dother=0)
        self.by_value(dvalues, squared, dvalue, workspace)
        self.by_squared(dvalues, value, by_squared, workspace)
        self.squared_relu_backward(x=k, other=0, grad=by_squared, y=dk, dother=0)
        self.by_key(dk, mixed_k, dkey, workspace)
        self.by_receptance(dr, mixed_r, dreceptance, workspace)
        self.by_mixed_k(dk, key, by_mixed_k, workspace)
        self.by_mixed_r(dr, receptance, by_mixed_r, workspace)
        self.run_shift_backward(x, (*shares, 0), (by_mixed_k, by_mixed_r, 0), dx, dshares, slab)


def _of_gradient(dtype: torch.dtype, of_map: torch.dtype) -> torch.dtype:
    """The dtype in which a product gives the gradient by a weight."""
    return dtype if dtype in (of_map, _SINGLE) else _SINGLE


_spatial_forward_of, _spatial_backward_of = cached(_SpatialForward), cached(_SpatialBackward)
_channel_forward_of, _channel_backward_of = cached(_ChannelForward), cached(_ChannelBackward)


# --- on tensors -------------------------------------------------------------------------------

def saved_size(find, x: Tensor, inner: int, out: int, dtype: torch.dtype) -> int:
    """Bytes that a forward keeps; ``find`` is of the layout, such as ``SPATIAL``."""
    return find(Sizes(*x.shape, inner, out, 0, 0.0, 0), dtype.itemsize)[1]


SPATIAL, CHANNEL = _saved_of_spatial, _saved_of_channel


def _start(x, shares, weights, dtype, *shift):
    """The tensors as the launches take them, which live until these are made; their addresses;
    and what the launches depend on."""
    if dtype == _SINGLE:  # the kernel that rounds is for half precision alone
        weights = [weight.float() for weight in weights]
    tensors, addresses = aligned(x, *shares, *weights)
    sizes = Sizes(*x.shape, len(weights[0]), len(weights[3 if len(weights) == 4 else 1]), *shift)
    share_types = tuple([t.dtype for t in shares] + [None] * (shifts.MOST - len(shares)))
    dtypes = Dtypes(x.dtype, dtype, share_types, tuple([t.dtype for t in weights]))
    tf32 = dtype == _SINGLE and torch.backends.cuda.matmul.allow_tf32
    return tensors, addresses, (x.get_device(), sizes, dtypes, tf32)


def _forward(launches, x: Tensor, out: int, save: bool, others: tuple[int, ...],
             addresses: list[int]) -> tuple[Tensor, Tensor]:
    """The result, and what the backward takes, which is empty unless ``save``."""
    result = x.new_empty((*x.shape[:-1], out), dtype=launches.dtype)
    saved = x.new_empty(launches.saved_size, dtype=torch.uint8)
    slab = x.new_empty(launches.slab.size, dtype=torch.uint8)
    arguments = (saved.data_ptr(), slab.data_ptr(), result.data_ptr(), *others, *addresses)
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return result, saved if save else x.new_empty(0, dtype=torch.uint8)


def _backward(launches, grad: Tensor, saved: Tensor, x: Tensor, shares, weights,
              others: tuple[int, ...], addresses: list[int]) -> tuple[Tensor, list, list]:
    """Gradients by x, the shares and the weights."""
    (grad,), (grad_at,) = aligned(grad.to(launches.dtype))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dshares = x.new_empty((shifts.MOST, x.shape[-1]), dtype=_SINGLE)
    dweights = [torch.empty(t.shape, dtype=_of_gradient(t.dtype, launches.dtype), device=x.device)
                for t in weights]
    slab = x.new_empty(launches.slab.size, dtype=torch.uint8)
    arguments = (saved.data_ptr(), slab.data_ptr(), grad_at, dx.data_ptr(), dshares.data_ptr(),
                 *others, tuple([t.data_ptr() for t in dweights]), *addresses)
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return (dx, [part.to(t.dtype) for part, t in zip(dshares, shares, strict=False)],
            [grad.to(t.dtype) for grad, t in zip(dweights, weights, strict=True)])


def spatial_forward(x, for_k, for_v, for_r, key, value, receptance, output, w, u, official, pixels,
                    share, dtype, save):
    """The result, and what the backward takes, which is empty unless ``save``."""
    held, addresses, described = _start(x, (for_k, for_v, for_r), (key, value, receptance, output),
                                        dtype, pixels, share, x.shape[-1])
    launches = _spatial_forward_of(*described, (w.dtype, u.dtype), official)
    decays = torch._foreach_div([w.contiguous(), u.contiguous()], x.shape[1] * x.shape[2])
    return _forward(launches, x, len(output), save, tuple([t.data_ptr() for t in decays]),
                    addresses)


def spatial_backward(grad, x, for_k, for_v, for_r, key, value, receptance, output, w, u, saved,
                     official, pixels, share, dtype):
    """Gradients by x and the parameters, in their dtypes."""
    shares, weights = (for_k, for_v, for_r), (key, value, receptance, output)
    held, addresses, described = _start(x, shares, weights, dtype, pixels, share, x.shape[-1])
    launches = _spatial_backward_of(*described, (w.dtype, u.dtype), official)
    tokens = x.shape[1] * x.shape[2]
    decays = torch._foreach_div([w.contiguous(), u.contiguous()], tokens)
    ddecays = [torch.empty_like(t) for t in decays]
    others = tuple([t.data_ptr() for t in (*ddecays, *decays)])
    dx, dshares, dweights = _backward(launches, grad, saved, x, shares, weights, others, addresses)
    torch._foreach_div_(ddecays, tokens)
    return dx, *dshares, *dweights, *ddecays


def channel_forward(x, for_k, for_r, key, value, receptance, pixels, share, head_dim, dtype, save):
    """The result, and what the backward takes, which is empty unless ``save``."""
    held, addresses, described = _start(x, (for_k, for_r), (key, value, receptance), dtype, pixels,
                                        share, head_dim)
    return _forward(_channel_forward_of(*described), x, len(value), save, (), addresses)


def channel_backward(grad, x, for_k, for_r, key, value, receptance, saved, pixels, share, head_dim,
                     dtype):
    """Gradients by x and the parameters, in their dtypes."""
    shares, weights = (for_k, for_r), (key, value, receptance)
    held, addresses, described = _start(x, shares, weights, dtype, pixels, share, head_dim)
    launches = _channel_backward_of(*described)
    dx, dshares, dweights = _backward(launches, grad, saved, x, shares, weights, (), addresses)
    return dx, *dshares, *dweights
