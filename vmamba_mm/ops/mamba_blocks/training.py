"""A Mamba block with its backward by the CUDA kernels of the ops that it is made of, and cuBLASLt.

It keeps the new residual stream, xz, the projections, and the sum of the directions before the
gate. The norm's result and the gated one are calculated again, beside what ``mamba_inner`` does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import Slab, aligned, cached
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import SumJob, sum_launch
from vmamba_mm.ops.mamba_blocks.cuda import Gather, Sizes, scatter_launch
from vmamba_mm.ops.mamba_blocks.weights import Direction, Weights, flatten, split
from vmamba_mm.ops.mamba_inner import cuda as inner

_SINGLE = torch.float32


class _Saved(NamedTuple):
    """Offsets in the slab for the backward, in bytes."""
    moments: int    # (B * L, 2), fp32, of the norm
    xz: int         # (B, L, 2D)
    projected: int  # (K, B * L, R + 2N and a gap)
    total: int      # (B, L, D)


def _lay_out_saved(sizes: Sizes, itemsize: int) -> tuple[_Saved, int]:
    """The offsets, and the size of the slab; sizes are symbols where torch.compile takes streams of
    any size."""
    slab, rows = Slab(), sizes.batch * sizes.length
    pitch = inner.projected_pitch(sizes.rank + 2 * sizes.state)
    return _Saved(slab.take(2 * rows), slab.take(rows * 2 * sizes.inner, itemsize),
                  slab.take(sizes.routes * rows * pitch, itemsize),
                  slab.take(rows * sizes.inner, itemsize)), slab.size


def saved_size(hidden: Tensor, weights: Weights, dtype: torch.dtype) -> int:
    """Bytes that a forward keeps beside the new residual stream."""
    return _lay_out_saved(Sizes.of(hidden, weights), dtype.itemsize)[1]


class _Launches:
    """What a forward and a backward share."""

    def __init__(self, index: int, sizes: Sizes, dtype: torch.dtype, tf32: bool, dtypes: Weights):
        self.index, self.dtype, self.tf32 = index, dtype, tf32
        self.rows = sizes.batch * sizes.length
        self.saved, self.saved_size = _lay_out_saved(sizes, dtype.itemsize)
        self.norm_sizes = sizes.batch, sizes.length, sizes.dim, dtypes.norm_bias is None
        self.mixer_dtypes = inner.Dtypes(dtype, *[_SINGLE] * 5)
        self.slab, self.workspace_size = Slab(), 0
        self.gather = Gather(index, dtype, self.slab, sizes, dtypes)

    def take(self, columns: int) -> int:
        """A part of the slab for a map of so many channels."""
        return self.slab.take(self.rows * columns, self.dtype.itemsize)

    def product(self, *sizes, out_dtype=None, **kwargs):
        product = gemm.product(self.index, self.dtype, out_dtype or self.dtype, *sizes,
                               tf32=self.tf32, **kwargs)
        self.workspace_size = max(self.workspace_size, product.workspace)
        return product.run


class _Forward(_Launches):
    def __init__(self, index, sizes, dtype, tf32, dtypes, scale):
        super().__init__(index, sizes, dtype, tf32, dtypes)
        dim, inner_dims = sizes.dim, sizes.inner
        self.norm = norm.forward_launch(index, _SINGLE, dtype, dtype, dtypes.norm,
                                        *self.norm_sizes)
        self.in_proj = self.product(self.rows, 2 * inner_dims, dim, right_t=True)
        self.out_proj = self.product(self.rows, dim, inner_dims, right_t=True)
        self.mixer = inner.forward_launch(index, sizes.mixer, self.mixer_dtypes, False, scale, True)
        self.normed_at, self.y_at = self.take(dim), self.take(inner_dims)
        self.workspace_at = self.slab.take(self.workspace_size, 1)
        self.memory_at = self.slab.take(self.mixer.memory, 1)

    def launch(self, eps, hidden, residual, new_hidden, new_residual, slab, saved, *addresses):
        weights, = split(addresses, 1)
        saved, gather = _Saved(*[saved + at for at in self.saved]), self.gather
        normed, y, workspace = slab + self.normed_at, slab + self.y_at, slab + self.workspace_at
        gather(weights, slab)
        self.norm(x=residual, branch=hidden, weight=weights.norm, bias=weights.norm_bias or 0,
                  sum=new_residual, normed=normed, moments=saved.moments, eps=eps)
        self.in_proj(normed, slab + gather.in_proj, saved.xz, workspace)
        self.mixer.run(xz=saved.xz, y=y, memory=slab + self.memory_at, projected=saved.projected,
                       total=saved.total, **gather.of_directions(slab))
        self.out_proj(y, slab + gather.out_proj, new_hidden, workspace)


class _Backward(_Launches):
    def __init__(self, index, sizes, dtype, tf32, dtypes, scale):
        super().__init__(index, sizes, dtype, tf32, dtypes)
        rows, dim, inner_dims = self.rows, sizes.dim, sizes.inner
        self.norm = norm.forward_launch(index, _SINGLE, None, dtype, dtypes.norm, *self.norm_sizes)
        parts, self.norm_backward = norm.backward_launch(index, dtype, _SINGLE, dtype, dtypes.norm,
                                                         *self.norm_sizes)
        self.sum = sum_launch(index, SumJob(parts, 1, dim, dtypes.norm, dtypes.norm_bias))
        self.out_proj = self.product(rows, inner_dims, dim)
        self.dout_proj = self.product(dim, inner_dims, rows, left_t=True, out_dtype=dtypes.out_proj)
        self.in_proj = self.product(rows, dim, 2 * inner_dims)
        self.din_proj = self.product(2 * inner_dims, dim, rows, left_t=True,
                                     out_dtype=dtypes.in_proj)
        self.gate = inner.gate_launch(index, sizes.mixer._replace(routes=1), dtype, False, scale)
        self.mixer = inner.backward_launch(index, sizes.mixer, self.mixer_dtypes, False, scale)
        self.z_at = inner_dims * dtype.itemsize

        self.normed_at, self.y_at, self.dy_at = self.take(dim), self.take(inner_dims), self.take(
            inner_dims)
        self.dxz_at = self.take(2 * inner_dims)
        self.grads_at = Direction(*[self.slab.take(sizes.routes * n) for n in sizes.direction])
        self.parts_at = self.slab.take(parts * 2 * dim)
        self.workspace_at = self.slab.take(self.workspace_size, 1)
        self.memory_at = self.slab.take(self.mixer.memory, 1)
        self.scatter = self._bind_scatter(sizes, dtypes)

    def _bind_scatter(self, sizes: Sizes, dtypes: Weights):
        """Takes the addresses of a direction's gradients after those of another, and the slab."""
        jobs = []  # elements, dtype, offset, factor
        for k, direction in enumerate(dtypes.directions):
            for name, size, type_, start in zip(Direction._fields, sizes.direction, direction,
                                                self.grads_at, strict=True):
                at = 4 * k * size
                # d A / d log(-A) is A, which is in fp32 too.
                factor = self.gather.starts.A_log + at if name == 'A_log' else -1
                jobs.append((size, type_, start + at, factor))
        return scatter_launch(self.index, *zip(*jobs, strict=True))

    def launch(self, eps, dhidden, dresidual, residual, saved, by_residual, by_hidden, slab, grads,
               *addresses):
        weights, = split(addresses, 1)
        grads, = split(grads, 1)
        saved, gather = _Saved(*[saved + at for at in self.saved]), self.gather
        normed, y, dy, dxz = (slab + at for at in (self.normed_at, self.y_at, self.dy_at,
                                                   self.dxz_at))
        workspace, z, parts = slab + self.workspace_at, saved.xz + self.z_at, slab + self.parts_at
        gather(weights, slab)
        self.out_proj(dhidden, slab + gather.out_proj, dy, workspace)
        self.gate(ys=saved.total, z=z, out=y)
        self.dout_proj(dhidden, y, grads.out_proj, workspace)
        stacked = {f'd{name}': slab + start for name, start in zip(
            inner.PARAMETERS, self.grads_at, strict=True)}
        self.mixer.run(grad=dy, xz=saved.xz, projected=saved.projected, total=saved.total, dxz=dxz,
                       memory=slab + self.memory_at, **gather.of_directions(slab), **stacked)
        self.scatter([address for direction in grads.directions for address in direction], slab)
        self.norm(x=residual, weight=weights.norm, bias=weights.norm_bias or 0, normed=normed,
                  eps=eps)
        self.din_proj(dxz, normed, grads.in_proj, workspace)
        # The norm's result is not needed any more.
        self.in_proj(dxz, slab + gather.in_proj, normed, workspace)
        self.norm_backward(grad=normed, input=residual, moments=saved.moments, weight=weights.norm,
                           extra_grad=dresidual, dinput=by_residual, dbranch=by_hidden,
                           partials=parts)
        self.sum((parts, grads.norm, grads.norm_bias or 0))


_forward_of, _backward_of = cached(_Forward), cached(_Backward)


def _key(residual: Tensor, weights: Weights, dtype: torch.dtype) -> tuple:
    tf32 = dtype == _SINGLE and torch.backends.cuda.matmul.allow_tf32
    dtypes = next(split([t.dtype for t in flatten(weights)], 1))
    return residual.get_device(), Sizes.of(residual, weights), dtype, tf32, dtypes


def forward(hidden: Tensor, residual: Tensor, weights: Weights, eps: float, scale: float,
            dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The new residual and hidden, and the slab for the backward."""
    (hidden, residual, *flat), addresses = aligned(hidden, residual, *flatten(weights))
    launches = _forward_of(*_key(residual, weights, dtype), scale)
    new_hidden, new_residual = torch.empty_like(hidden), torch.empty_like(residual)
    slab = hidden.new_empty(launches.slab.size, dtype=torch.uint8)
    saved = hidden.new_empty(launches.saved_size, dtype=torch.uint8)
    arguments = (eps, *addresses[:2], new_hidden.data_ptr(), new_residual.data_ptr(),
                 slab.data_ptr(), saved.data_ptr(), *addresses[2:])
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return new_residual, new_hidden, saved


def backward(dresidual: Tensor | None, dhidden: Tensor | None, residual: Tensor, weights: Weights,
             saved: Tensor, eps: float, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients by hidden, residual and the flat weights; ``residual`` is the new one."""
    if dhidden is None:
        dhidden = torch.zeros(residual.shape, dtype=dtype, device=residual.device)
    if dresidual is None:
        dresidual = torch.zeros_like(residual)
    tensors, addresses = aligned(dhidden.to(dtype), dresidual.to(_SINGLE), residual, saved,
                                 *flatten(weights))
    launches = _backward_of(*_key(residual, weights, dtype), scale)
    by_residual = torch.empty(residual.shape, dtype=_SINGLE, device=residual.device)
    by_hidden = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in flatten(weights)]
    slab = residual.new_empty(launches.slab.size, dtype=torch.uint8)
    arguments = (eps, *addresses[:4], by_residual.data_ptr(), by_hidden.data_ptr(),
                 slab.data_ptr(), tuple([grad.data_ptr() for grad in grads]), *addresses[4:])
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return by_hidden, by_residual, *grads
