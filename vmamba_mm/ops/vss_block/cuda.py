"""``vss_block`` by the CUDA kernels of the ops that it is made of, and cuBLASLt.

A small batch waits for Python. So what depends on sizes and dtypes is worked out once, a call
deals in addresses, and maps lie in one or two slabs of memory, where one takes another's place
(:mod:`vmamba_mm.ops.vss_block.buffers`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.grad_places import new_grad
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import CODES, aligned, cached
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import cast_launch, plan_cast
from vmamba_mm.ops.fused.channels import WIDEST, SumJob, sum_launch
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.fused.mlp.hidden import hidden_launch
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.vss_block import scan
from vmamba_mm.ops.vss_block.buffers import (
    BackwardSlab,
    ForwardSlab,
    Saved,
    in_bytes,
    lay_out,
)
from vmamba_mm.ops.vss_block.weights import NUM_WEIGHTS, Weights

#: N at most: the kernels would divide the states of a channel among several scans.
MOST_STATES = 16


class _Factors(NamedTuple):
    """Parameters of the matrix products, which have the products' dtype, or are rounded to it. The
    kernels for half-precision maps with N = 1 round x_proj themselves; a backward needs no bias."""
    in_proj: int
    out_proj: int
    x_proj: int
    fc1: int
    fc2: int
    fc1_bias: int
    fc2_bias: int

    @classmethod
    def of(cls, weights: Weights) -> '_Factors':
        return cls(weights.in_proj, weights.out_proj, weights.x_proj, weights.fc1, weights.fc2,
                   weights.fc1_bias, weights.fc2_bias)


class _Widths(NamedTuple):
    """The sizes of a block beside those of its map."""
    inner: int
    in_proj: int  # columns: those of the gate are the second half
    hidden: int   # 0 without an MLP
    rank: int
    routes: int
    state: int

    @classmethod
    def of(cls, weights: Weights) -> '_Widths':
        routes, inner, rank = weights.dt_projs.shape
        hidden = 0 if weights.fc1 is None else weights.fc1.shape[0]
        return cls(inner, weights.in_proj.shape[0], hidden, rank, routes, weights.A_logs.shape[1])


def why_not(x: Tensor, dtype: torch.dtype, weights: Weights) -> str | None:
    """The reason why ``vss_block`` cannot take these inputs, or None."""
    dim, (inner, in_proj, hidden, rank, _, state) = x.shape[3], _Widths.of(weights)
    if (reason := scans.why_not(x, rank, state)) is not None:
        return reason
    if weights.in_proj.device != x.device:
        return 'its parameters are on another device than the input'
    if dtype not in CODES:
        return 'it takes matrix products in float32, float16 or bfloat16'
    if state > MOST_STATES:
        return f'a state of {state}: it takes up to {MOST_STATES}'
    if in_proj not in (inner, 2 * inner):
        return f'in_proj has {in_proj} columns for {inner} inner channels'
    if dim % 4 or inner % 4 or hidden % 4 or max(dim, inner) > WIDEST:
        return f'{dim} channels, {inner} inner and {hidden} hidden ones: it takes multiples of 4 ' \
               f'up to {WIDEST}'
    if x.shape[1] * x.shape[2] * inner >= 2**31:
        return 'a sample has 2^31 elements or more'
    dtypes = [t.dtype for t in weights if t is not None]
    if all(d == dtypes[0] for d in dtypes):  # mostly, and a small batch waits for the questions
        dtypes = dtypes[:1]
    if any(d not in CODES for d in dtypes):  # sets are too much for Dynamo of torch 2.11
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if dtype == torch.float32 and any(d != dtype for d in (x.dtype, *dtypes)):
        return 'matrix products in float32 are for a map and parameters in float32'
    factors = _factors_in(dtype, state, weights) if len(dtypes) > 1 else (weights.in_proj,)
    if any(t is not None and t.dtype not in (dtype, torch.float32) for t in factors):
        return f'a parameter of a matrix product is neither float32 nor {dtype}'
    if len(dtypes) > 1 and any(weight.dtype != bias.dtype for weight, bias in (
            (weights.norm1, weights.norm1_bias), (weights.out_norm, weights.out_norm_bias),
            (weights.norm2, weights.norm2_bias)) if weight is not None):
        return 'weight and bias of a norm differ in dtype'
    return gemm.why_not()


def _factors_in(dtype: torch.dtype, state: int, weights: Weights, backward: bool = False
                ) -> _Factors:
    """Those that are to be in ``dtype``, None for the others and what there is not."""
    factors = _Factors.of(weights)
    if scan.is_half(dtype, state):
        factors = factors._replace(x_proj=None)
    return factors._replace(fc1_bias=None, fc2_bias=None) if backward else factors


def saved_size(x: Tensor, weights: Weights, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that a forward keeps in its slab for the backward."""
    return _lay_out_saved(x.shape, _Widths.of(weights), x.dtype, dtype)[1]


def _lay_out_saved(shape, widths, x_dtype, dtype) -> tuple[list[int], int]:
    """The offsets of the fields of :class:`Saved` in the slab for the backward, and its size, in
    elements."""
    batch, height, width, dim = shape
    inner, in_proj, hidden, rank, routes, state = widths
    pixels = batch * height * width
    row, *scan_state = scan.saved_sizes(dtype, (batch, inner, height, width, rank, routes), state)
    moments = 8 // dtype.itemsize * pixels
    has_mlp = int(hidden > 0)  # no bool, which torch 2.11 does not multiply by a symbol
    return lay_out(*Saved(
        normed1=pixels * dim, moments1=moments, in_projected=pixels * in_proj,
        scan_input=pixels * inner, projected=pixels * routes * row, scan_state=sum(scan_state),
        merged=pixels * inner, merged_moments=moments,
        total=has_mlp * pixels * dim * x_dtype.itemsize // dtype.itemsize,
        normed2=has_mlp * pixels * dim, moments2=has_mlp * moments,
        gelu_input=pixels * hidden))


class _Launches:
    """The launches that a forward and a backward share, for these sizes and dtypes."""

    def __init__(self, index, shape, widths, x_dtype, dtype, tf32):
        batch, height, width, self.dim = shape
        self.inner, self.in_width, self.hidden, rank, routes, self.state = widths
        self.index, self.batch, self.length = index, batch, height * width
        self.x_dtype, self.dtype, self.tf32 = x_dtype, dtype, tf32
        self.pixels = batch * self.length
        # Elements of dtype for one of the residual sum, and for one in fp32.
        self.of_residual = x_dtype.itemsize // dtype.itemsize
        self.of_float = 4 // dtype.itemsize
        self.scan_sizes = (batch, self.inner, height, width, rank, routes)
        # Strides of a map from an image and a pixel to the next, and its shape: that of the
        # convolution's input, beside which the gate may be, and of its result.
        self.conv_input, self.conv_map = ((
            (self.length * n, n), (batch, height, width, self.inner))
            for n in (self.in_width, self.inner))
        # Whether there is a gate, and its distance from what the convolution takes, in bytes.
        self.gate_stride = self.in_width if self.in_width > self.inner else 0
        self.to_gate = self.inner * dtype.itemsize
        self.scan_columns = routes * (rank + 2 * self.state)
        saved, self.saved_size = _lay_out_saved(shape, widths, x_dtype, dtype)
        self.saved = in_bytes(dtype, saved)
        self.workspace_size = 0

    def norm(self, x, branch, out, weight, dim=None):
        return norm.forward_launch(self.index, x, branch, out, weight, self.batch, self.length,
                                   dim or self.dim)

    def norm_backward(self, grad, x, branch, weight, dim=None):
        return norm.backward_launch(self.index, grad, x, branch, weight, self.batch, self.length,
                                    dim or self.dim)

    def product(self, *sizes, out_dtype=None, **kwargs):
        return self.with_workspace(gemm.product(
            self.index, self.dtype, out_dtype or self.dtype, *sizes, tf32=self.tf32, **kwargs))

    def with_workspace(self, product):
        self.workspace_size = max(self.workspace_size, product.workspace // self.dtype.itemsize)
        return product.run

    def plan_rounding(self, dtypes: Weights, backward: bool) -> tuple[tuple, tuple]:
        """Sizes and dtypes of the factors that are rounded by each call, if any.

        ``to_round`` and ``rounded`` are for :meth:`round_factors`.
        """
        dim, inner, hidden, columns = self.dim, self.inner, self.hidden, self.scan_columns
        sizes = _Factors(self.in_width * dim, dim * inner, columns * inner, hidden * dim,
                         dim * hidden, hidden, dim)
        found = _factors_in(self.dtype, self.state, dtypes, backward)
        self.to_round, self.rounded, self.rounded_size = (), (), 0
        if all(d in (None, self.dtype) for d in found):
            return (), ()
        self.to_round = tuple([i for i, d in enumerate(found) if d is not None])
        casts = tuple([sizes[i] for i in self.to_round]), tuple([found[i] for i in self.to_round])
        *starts, self.rounded_size = plan_cast(*casts).starts
        self.rounded = in_bytes(self.dtype, starts)
        return casts

    def round_factors(self, weights: Weights, to: int) -> tuple[_Factors, tuple[int, ...]]:
        """The addresses of the factors, where ``to`` is that of the rounded ones, and of those that
        are to be rounded."""
        factors = _Factors.of(weights)
        if not self.to_round:
            return factors, ()
        addresses = list(factors)
        for i, start in zip(self.to_round, self.rounded, strict=True):
            addresses[i] = to + start
        return _Factors._make(addresses), tuple([factors[i] for i in self.to_round])


class _Forward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, tf32, out_dtype, dtypes, save):
        super().__init__(index, shape, widths, x_dtype, dtype, tf32)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        dtypes, self.save = Weights._make(dtypes), save
        casts = self.plan_rounding(dtypes, backward=False)
        self.norm1 = self.norm(x_dtype, None, dtype, dtypes.norm1)
        self.in_proj = self.product(pixels, self.in_width, dim, right_t=True)
        self.convolve = dwconv.forward_launch(index, dtype, dtypes.conv, dtypes.conv_bias, True,
                                              *self.conv_input)
        self.scan = scan.forward_of(dtype, self.state)(
            index, dtype, self.scan_sizes, self.state, dtypes, self.product, casts,
            self.gate_stride)
        self.out_proj = self.product(pixels, dim, inner, right_t=True)
        if hidden:
            self.norm2 = self.norm(x_dtype, dtype, dtype, dtypes.norm2)
            self.fc1 = self.with_workspace(hidden_launch(index, dtype, pixels, hidden, dim, tf32))
            self.fc2 = self.product(pixels, dim, hidden, right_t=True, bias=True)
        self.add_and_norm1 = self.norm(x_dtype, dtype, dtype, dtypes.norm1)
        self.add = self.norm(x_dtype, dtype, out_dtype, None)

        # Maps take one another's place: the results of products; what the scan reads, and its
        # branch; the scan's maps, and what is hidden in the MLP. The gate is needed after the scan.
        narrow, wide = pixels * max(dim, inner), pixels * max(self.scan.maps * inner, hidden)
        (rounded, workspace, scan_memory, narrow, other, wide, *rest), self.slab_size = lay_out(
            self.rounded_size, self.workspace_size, self.scan.memory, narrow, narrow, wide,
            *() if save else (pixels * dim, pixels * self.scan.columns,
                              self.scan.states // dtype.itemsize, pixels * dim * self.of_residual,
                              pixels * self.gate_stride))
        self.slab = in_bytes(dtype, ForwardSlab(
            rounded, workspace, scan_memory, scan_maps=wide, out_normed=narrow, branch1=other,
            hidden=wide, branch2=narrow))
        if not save:
            normed, projected, scan_state, total, gated = rest
            # The last four are not written.
            self.saved = in_bytes(dtype, Saved(
                normed1=normed, in_projected=gated if self.gate_stride else narrow,
                scan_input=other, projected=projected, scan_state=scan_state, total=total,
                normed2=normed, gelu_input=wide)[:-4])

    def __call__(self, x, addresses, scales, eps, result, saved):
        """Write ``result``, and ``saved`` if it is there; ``addresses`` of the weights of a block,
        or without ``saved`` of several."""
        slab = x.new_empty(self.slab_size, dtype=self.dtype)
        arguments = (*_addresses(x, slab, result, saved, *scales), *addresses)
        replay(self.index, (self, eps, arguments), lambda: self._launch(eps, *arguments))

    def _launch(self, eps, x, slab, result, saved, scale1, scale2, *addresses):
        start = saved if self.save else slab
        saved = Saved(*[start + n for n in self.saved])
        slab = ForwardSlab(*[slab + n for n in self.slab])
        gate = saved.in_projected + self.to_gate if self.gate_stride else 0
        workspace, branch, scale = slab.workspace, 0, None
        for i in range(0, len(addresses), NUM_WEIGHTS):
            w = Weights._make(addresses[i:i + NUM_WEIGHTS])
            factors, to_round = self.round_factors(w, slab.rounded)
            self.scan.prepare(w.x_proj, w.dt_projs, w.dt_bias, w.A_logs, w.D, saved.scan_state,
                              slab.scan_memory, to_round, slab.rounded)

            if i == 0:
                self.norm1(x=x, weight=w.norm1, bias=w.norm1_bias, normed=saved.normed1,
                           moments=saved.moments1, eps=eps)
            else:  # the end of the block before and the beginning of this one
                self.add_and_norm1(x=x, branch=branch, weight=w.norm1, bias=w.norm1_bias,
                                   sum=saved.total, normed=saved.normed1, eps=eps)
                x = saved.total
            self.in_proj(saved.normed1, factors.in_proj, saved.in_projected, workspace)
            self.convolve(x_data=saved.in_projected, weight=w.conv, bias=w.conv_bias,
                          y=saved.scan_input)
            self.scan.project_and_scan(factors.x_proj, saved, slab, self.save)
            self.scan.merge(maps=slab.scan_maps, merged=saved.merged, normed=slab.out_normed,
                            weight=w.out_norm, bias=w.out_norm_bias,
                            moments=saved.merged_moments, gate=gate, eps=eps)
            self.out_proj(slab.out_normed, factors.out_proj, slab.branch1, workspace)
            branch, scale = slab.branch1, scale1
            if not self.hidden:
                continue
            self.norm2(x=x, branch=branch, scale=scale, weight=w.norm2, bias=w.norm2_bias,
                       sum=saved.total, normed=saved.normed2, moments=saved.moments2, eps=eps)
            self.fc1(saved.normed2, factors.fc1, saved.gelu_input, slab.hidden, workspace,
                     factors.fc1_bias)
            self.fc2(slab.hidden, factors.fc2, slab.branch2, workspace, factors.fc2_bias)
            x, branch, scale = saved.total, slab.branch2, scale2
        self.add(x=x, branch=branch, scale=scale, sum=result, eps=0.0)


class _Backward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, tf32, dtypes):
        super().__init__(index, shape, widths, x_dtype, dtype, tf32)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        dtypes = Weights._make(dtypes)
        casts = self.plan_rounding(dtypes, backward=True)
        self.round = cast_launch(index, dtype, *casts)[1] if self.to_round else None

        fc1_parts = fc2_parts = norm2_parts = 0
        if hidden:
            self.fc2 = self.product(pixels, hidden, dim)
            fc1_parts, self.gelu = mlp.column_launch(index, dtype, True, pixels, hidden)
            self.dfc2 = self.product(dim, hidden, pixels, left_t=True, out_dtype=dtypes.fc2)
            self.fc1 = self.product(pixels, dim, hidden)
            self.dfc1 = self.product(hidden, dim, pixels, left_t=True, out_dtype=dtypes.fc1)
            fc2_parts, self.sum_columns = mlp.column_launch(index, dtype, False, pixels, dim)
            norm2_parts, self.norm2 = self.norm_backward(dtype, x_dtype, dtype, dtypes.norm2)
        self.norm_again = self.norm(dtype, None, dtype, dtypes.out_norm, inner)
        self.out_proj = self.product(pixels, inner, dim)
        self.dout_proj = self.product(dim, inner, pixels, left_t=True, out_dtype=dtypes.out_proj)
        out_norm_parts, self.out_norm = norm.backward_launch(
            index, dtype, dtype, None, dtypes.out_norm, self.batch, self.length, inner,
            gate_strides=(self.gate_stride,) * 2, silu=self.gate_stride > 0)
        self.scan = scan.backward_of(dtype, self.state)(
            index, dtype, self.scan_sizes, self.state, dtypes, out_norm_parts, self.product)
        conv_parts, self.convolve = dwconv.backward_launch(index, dtype, dtypes.conv,
                                                           dtypes.conv_bias, *self.conv_input)
        self.transposed = dwconv.forward_launch(index, dtype, dtypes.conv, None, False,
                                                *self.conv_map, y_pixel=self.in_width)
        self.din_proj = self.product(self.in_width, dim, pixels, left_t=True,
                                     out_dtype=dtypes.in_proj)
        self.in_proj = self.product(pixels, dim, self.in_width)
        norm1_parts, self.norm1 = self.norm_backward(dtype, x_dtype, None, dtypes.norm1)
        of_mlp = (SumJob(fc1_parts, 0, hidden, None, dtypes.fc1_bias),
                  SumJob(fc2_parts, 0, dim, None, dtypes.fc2_bias),
                  SumJob(norm2_parts, 1, dim, dtypes.norm2, dtypes.norm2_bias)) if hidden else ()
        self.sum = sum_launch(  # in the order of _sum_parts
            index, *of_mlp, SumJob(conv_parts, 9, inner, dtypes.conv, dtypes.conv_bias),
            SumJob(norm1_parts, 1, dim, dtypes.norm1, dtypes.norm1_bias), *self.scan.jobs)

        # Two maps of the MLP, whose place those of the scan take later.
        projected = pixels * self.scan.columns
        of_part, gated = self.scan.parts_dtype.itemsize // dtype.itemsize, bool(self.gate_stride)
        (dhidden, hidden_map), mlp_end = lay_out(pixels * hidden, pixels * hidden)
        (map1, map2, map3, scan_maps, dprojected, dx_proj, scan_memory, dprojected_sum,
         din_projected), scan_end = lay_out(
            *[pixels * inner] * 3, self.scan.maps * pixels * inner,
            self.scan.parts * of_part * projected, self.scan.dx_proj, self.scan.memory,
            of_part * projected if self.scan.parts > 1 else 0, pixels * self.gate_stride)
        partial = self.of_float
        (rounded, workspace, narrow, dbranch1, dtotal, fc1_parts, fc2_parts, norm2_parts,
         conv_parts, norm1_parts, out_norm_parts, shared), self.slab_size = lay_out(
            self.rounded_size, self.workspace_size, pixels * dim, bool(hidden) * pixels * dim,
            bool(hidden) * pixels * dim * self.of_residual, partial * fc1_parts * hidden,
            partial * fc2_parts * dim, partial * norm2_parts * 2 * dim,
            # The scan's are summed before there are those of the convolution.
            partial * max(conv_parts * 10 * inner, self.scan.partials),
            partial * norm1_parts * 2 * dim, partial * out_norm_parts * 2 * inner,
            max(mlp_end, scan_end))
        self.slab = in_bytes(dtype, BackwardSlab(
            rounded, workspace, scan_memory=shared + scan_memory, dhidden=shared + dhidden,
            hidden=shared + hidden_map, dnormed2=narrow, dtotal=dtotal, dbranch1=dbranch1,
            out_normed=shared + map1, dout_normed=shared + map2, dmerged=shared + map3,
            scan_maps=shared + scan_maps, dprojected=shared + dprojected,
            dprojected_sum=shared + dprojected_sum, dx_proj=shared + dx_proj,
            dscan_input=shared + map2, dconv=shared + map1,
            din_projected=shared + (din_projected if gated else map3),
            dnormed1=narrow, fc1_parts=fc1_parts, fc2_parts=fc2_parts, norm2_parts=norm2_parts,
            out_norm_parts=out_norm_parts, scan_parts=conv_parts, conv_parts=conv_parts,
            norm1_parts=norm1_parts))
        # torch may need memory of its own to sum more.
        self.graphs = self.scan.parts * projected * self.scan.parts_dtype.itemsize < 2**31

    def __call__(self, grad, x, weights, addresses, scales, saved, eps):
        """Gradients by x and the weights, an empty one by a bias that is None."""
        slab = x.new_empty(self.slab_size, dtype=self.dtype)
        dx = torch.empty_like(x)
        grads = [x.new_empty(0) if t is None else new_grad(t) for t in weights]
        dy = grad.to(x.dtype)
        dbranch = norm.scaled(grad, scales[1 if self.hidden else 0], self.dtype)
        arguments = (*_addresses(x, slab, saved, dy, dbranch, dx, scales[0]), *addresses)
        to = _addresses(*grads)

        def launch():
            self._launch(eps, slab, to, *arguments)

        if self.graphs:
            replay(self.index, (self, eps, arguments, to), launch)
        else:
            launch()
        return dx, *grads

    def _launch(self, eps, slab, grads, x, base, saved, dy, dbranch, dx, scale1, *addresses):
        w, grads = Weights._make(addresses), Weights._make(grads)
        saved = Saved(*[saved + n for n in self.saved])
        b = BackwardSlab(*[base + n for n in self.slab])
        workspace = b.workspace
        factors, to_round = self.round_factors(w, b.rounded)
        if to_round:
            self.round(to_round, b.rounded)

        dbranch1, extra_grad = dbranch, dy
        if self.hidden:
            self.fc2(dbranch, factors.fc2, b.dhidden, workspace)
            self.gelu(grad=b.dhidden, input=saved.gelu_input, result=b.hidden, dinput=b.dhidden,
                      partials=b.fc1_parts)
            self.dfc2(dbranch, b.hidden, grads.fc2, workspace)
            self.fc1(b.dhidden, factors.fc1, b.dnormed2, workspace)
            self.dfc1(b.dhidden, saved.normed2, grads.fc1, workspace)
            self.sum_columns(grad=dbranch, partials=b.fc2_parts)
            self.norm2(grad=b.dnormed2, input=saved.total, moments=saved.moments2, weight=w.norm2,
                       extra_grad=dy, scale=scale1, dinput=b.dtotal, dbranch=b.dbranch1,
                       partials=b.norm2_parts)
            dbranch1, extra_grad = b.dbranch1, b.dtotal

        # What out_proj took is calculated again, from the map before its norm.
        self.out_proj(dbranch1, factors.out_proj, b.dout_normed, workspace)
        of_norm = dict(grad=b.dout_normed, input=saved.merged, moments=saved.merged_moments,
                       weight=w.out_norm, dinput=b.dmerged, partials=b.out_norm_parts)
        if self.gate_stride:
            self.out_norm(bias=w.out_norm_bias, gate=saved.in_projected + self.to_gate,
                          dgate=b.din_projected + self.to_gate, result=b.out_normed, **of_norm)
        else:
            self.norm_again(x=saved.merged, weight=w.out_norm, bias=w.out_norm_bias,
                            normed=b.out_normed, eps=eps)
            self.out_norm(**of_norm)
        self.dout_proj(dbranch1, b.out_normed, grads.out_proj, workspace)
        self.scan.scan(saved, b)
        dprojected = self._sum_dprojected(slab, b) if self.scan.parts > 1 else b.dprojected
        self.scan.project_and_finish(w, factors.x_proj, grads, saved, b, dprojected)

        self.convolve(x_data=saved.in_projected, weight=w.conv, bias=w.conv_bias, dy=b.dscan_input,
                      dz=b.dconv, partials=b.conv_parts)
        self.transposed(x_data=b.dconv, weight=w.conv, y=b.din_projected)
        self.din_proj(b.din_projected, saved.normed1, grads.in_proj, workspace)
        self.in_proj(b.din_projected, factors.in_proj, b.dnormed1, workspace)
        self.norm1(grad=b.dnormed1, input=x, moments=saved.moments1, weight=w.norm1,
                   extra_grad=extra_grad, dinput=dx, partials=b.norm1_parts)
        self._sum_parts(b, grads)

    def _sum_dprojected(self, slab, b: BackwardSlab) -> int:
        """The address of the sum of the parts, in the block's dtype."""
        parts, size, dtype = self.scan.parts, self.pixels * self.scan.columns, self.scan.parts_dtype
        base, slab_of = slab.data_ptr(), slab if dtype == self.dtype else slab.view(dtype)
        source, target = ((address - base) // dtype.itemsize
                          for address in (b.dprojected, b.dprojected_sum))
        total = slab_of.as_strided((size,), (1,), target)
        torch.sum(slab_of.as_strided((parts, size), (size, 1), source), 0, out=total)
        if dtype == self.dtype:
            return b.dprojected_sum
        first = (b.dprojected - base) // self.dtype.itemsize
        slab.as_strided((size,), (1,), first).copy_(total)  # nobody reads the parts any more
        return b.dprojected

    def _sum_parts(self, b: BackwardSlab, grads: Weights):
        jobs = [(b.conv_parts, grads.conv, grads.conv_bias),
                (b.norm1_parts, grads.norm1, grads.norm1_bias)]
        if self.hidden:
            jobs = [(b.fc1_parts, 0, grads.fc1_bias), (b.fc2_parts, 0, grads.fc2_bias),
                    (b.norm2_parts, grads.norm2, grads.norm2_bias), *jobs]
        if self.scan.jobs:
            jobs.append((b.out_norm_parts, grads.out_norm, grads.out_norm_bias))
        self.sum(*jobs)


_forward_of, _backward_of = cached(_Forward), cached(_Backward)


def _key(x, weights: Weights, dtype):
    """The sizes and dtypes that decide the launches."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return ((x.get_device(), x.shape, _Widths.of(weights), x.dtype, dtype, tf32),
            tuple([None if t is None else t.dtype for t in weights]))


def _addresses(*tensors):
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def forward(x, weights, scales, eps, dtype, out_dtype, save):
    """The result, and if ``save`` the slab for the backward, else None; ``weights``: the fields of
    :class:`Weights` of one block after the other, all in the same dtypes, more than one without
    ``save`` and ``scales``."""
    first = weights if isinstance(weights, Weights) else Weights._make(weights[:NUM_WEIGHTS])
    key, dtypes = _key(x, first, dtype)
    (x, *weights), (_, *addresses) = aligned(x, *weights)
    result = x.new_empty(x.shape, dtype=out_dtype)
    launches = _forward_of(*key, out_dtype, dtypes, save)
    saved = x.new_empty(launches.saved_size, dtype=dtype) if save else None
    launches(x, addresses, scales, eps, result, saved)
    return result, saved


def backward(grad, x, weights, scales, saved, eps):
    """Gradients by x and the weights, an empty one by a bias that is None."""
    key, dtypes = _key(x, weights, saved.dtype)
    (grad, x, *weights), (_, _, *addresses) = aligned(grad, x, *weights)
    return _backward_of(*key, dtypes)(grad, x, weights, addresses, scales, saved, eps)
