"""``vss_block`` by the CUDA kernels of the ops that it is made of, and torch's matrix products.

A small batch waits for Python. So what depends on sizes and dtypes is worked out once, a call
deals in addresses, and maps lie in one or two slabs of memory, where one takes another's place.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops import walk
from vmamba_mm.ops.add_norm import cuda as norm
from vmamba_mm.ops.channels import WIDEST, sum_launch
from vmamba_mm.ops.dwconv import cuda as dwconv
from vmamba_mm.ops.mlp import cuda as mlp
from vmamba_mm.ops.nvrtc import cached
from vmamba_mm.ops.ss2d_scan import cuda as scan
from vmamba_mm.ops.ss2d_scan import cut

#: in this order: weights and biases of norm1, in_proj, conv, x_proj, dt_projs, dt_projs' bias,
#: A_logs, D, of out_norm, out_proj, of norm2, of fc1, of fc2, and the convolution's bias
_CAST, _CAST_BACK = (2, 11, 14, 15, 16, 17), (2, 11, 14, 16)
_SCAN = slice(4, 9)


def why_not(x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> str | None:
    """What keeps ``vss_block`` from taking these inputs, or None; ``tensors`` are its parameters
    without the bias of the convolution."""
    in_proj, x_proj, dt_projs, hidden = tensors[2], tensors[4], tensors[5], tensors[14]
    if (reason := walk.why_not(x, dt_projs.shape[2], 1)) is not None:
        return reason
    dim, inner, wide = x.shape[3], in_proj.shape[0], hidden.shape[0]
    if dtype not in (torch.float16, torch.bfloat16) or x_proj.shape[1] != dt_projs.shape[2] + 2:
        return 'it takes a state of 1 and matrix products in half precision'
    if dim % 4 or inner % 4 or wide % 4 or max(dim, inner) > WIDEST:
        return f'{dim} channels, {inner} inner and {wide} hidden ones: it takes multiples of 4 ' \
               f'up to {WIDEST}'
    if x.shape[1] * x.shape[2] * inner >= 2**31:
        return 'a sample has 2^31 elements or more'
    dtypes = [t.dtype for t in tensors]
    if not walk.CODES.keys() >= set(dtypes):
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if dtypes[0] != dtypes[1] or dtypes[9] != dtypes[10] or dtypes[12] != dtypes[13]:
        return 'weight and bias of a norm differ in dtype'
    return None


def saved_places(x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[list[int], int]:
    """Where in the slab for the backward each part begins, and its size, in elements: normed1 and
    its moments, what the convolution and the scan take, the projected input, the scan's ``kept``
    and ``merged``, the sum and its norm with moments, GELU's input."""
    batch, height, width, dim = x.shape
    routes, inner, rank = parameters[5].shape
    length, hidden = height * width, parameters[14].shape[0]
    pixels = batch * length
    return _places(pixels * dim, 4 * pixels, pixels * inner, pixels * inner,
                   pixels * routes * cut.row_of(rank),
                   sum(cut.kept_sizes(batch, inner, length, rank, routes)), pixels * (inner + 4),
                   pixels * dim * x.dtype.itemsize // 2, pixels * dim, 4 * pixels, pixels * hidden)


def _places(*sizes: int) -> tuple[list[int], int]:
    """Where in a slab each begins, at a multiple of 256 bytes, and where the last ends."""
    *starts, end = accumulate((-(-size // 128) * 128 for size in sizes), initial=0)
    return starts, end


class _Launches:
    """What a forward and a backward share, for these sizes and dtypes."""

    def __init__(self, index, shape, widths, x_dtype, dtype, dtypes):
        batch, height, width, self.dim = shape
        self.inner, self.hidden, rank, routes = widths
        self.dtype, self.length = dtype, height * width
        self.pixels = batch * self.length
        self.sizes = (batch, self.inner, height, width, rank, routes)
        self.plan = cut.plan_of(*self.sizes, index)
        self.product = routes * self.plan.row
        self.on_dim = index, batch, self.length, self.dim
        self.map = (self.length * self.inner, self.inner), (batch, height, width, self.inner)
        self.fields = (self.length * self.inner, self.inner, 1, 1, 0)  # of a map of the scan

    def norm(self, *dtypes):
        index, *shape = self.on_dim
        return norm.forward_launch(index, *dtypes, *shape)

    def cast(self, index, parameters, dtypes, sizes):
        """Where the parameters begin in a slab, and what rounds them there; [], None where all
        have the dtype."""
        if all(dtypes[i] == self.dtype for i in parameters):
            return [0], None
        return mlp.cast_launch(index, self.dtype, sizes, tuple(dtypes[i] for i in parameters))

    def matrix(self, slab, place, columns):
        """A map in a slab, as (pixels, columns)."""
        return slab.as_strided((self.pixels, columns), (columns, 1), place)


class _Forward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, out_dtype, dtypes, save):
        super().__init__(index, shape, widths, x_dtype, dtype, dtypes)
        dim, inner, hidden, plan = self.dim, self.inner, self.hidden, self.plan
        self.norm1 = self.norm(x_dtype, None, dtype, dtypes[0])
        self.norm2 = self.norm(x_dtype, dtype, dtype, dtypes[12])
        self.add = self.norm(x_dtype, dtype, out_dtype, None)
        self.convolve = dwconv.forward_launch(index, dtype, dtypes[3], dtypes[18], True, *self.map)
        self.prepare = scan.prepare_launch(index, dtype, self.sizes, dtypes[_SCAN], True)
        self.scan = scan.scan_launch(index, dtype, self.sizes, (self.fields,), False)
        self.merge = scan.merge_launch(index, dtype, self.sizes, False, False, dtypes[9])
        self.starts, self.round = self.cast(index, _CAST, dtypes, (
            inner * dim, dim * inner, hidden * dim, hidden, dim * hidden, dim))
        # Maps that take one another's place: the products' results; what the scan reads, and the
        # branch; the scan's maps, and what is hidden in the MLP.
        narrow, wide = max(dim, inner), max(plan.forward.maps * inner, hidden)
        absent = 0 if save else self.pixels
        places, self.size = _places(
            self.starts[-1], self.pixels * narrow, self.pixels * narrow, self.pixels * wide,
            self.scan.memory // 2, absent * dim, absent * self.product,
            0 if save else plan.offsets[-2] // 2, absent * dim * x_dtype.itemsize // 2)
        (self.weights, self.narrow, self.other, self.wide, self.memory, self.normed,
         self.projected, self.kept, self.total) = places

    def __call__(self, x, parameters, scales, eps, result, saved, places):
        """Writes ``result``, and ``saved``, if it is there, at its ``places``."""
        dim, inner, hidden = self.dim, self.inner, self.hidden
        work = x.new_empty(self.size, dtype=self.dtype)
        base, x = work.data_ptr(), x.data_ptr()
        if saved is None:
            slab = work
            normed1 = normed2 = self.normed
            before, given, branch, merging = self.narrow, self.other, self.other, self.narrow
            projected, kept, total, wide = self.projected, self.kept, self.total, self.wide
            merged = moments1 = moments2 = moments = states = 0
        else:
            slab = saved
            (normed1, moments1, before, given, projected, kept, merged, total, normed2, moments2,
             wide) = places
            branch, merging = self.other, self.narrow
        start = slab.data_ptr()
        if saved is not None:
            moments1, merged, moments2 = (start + 2 * n for n in (moments1, merged, moments2))
            moments = merged + 2 * self.pixels * inner
            states = start + 2 * kept + self.plan.offsets[-2]
        (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
         out_norm_bias, out_proj, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias, conv_bias
         ) = [0 if t is None else t.data_ptr() for t in parameters]
        scale1, scale2 = (0 if scale is None else scale.data_ptr() for scale in scales)

        def at(place):
            return start + 2 * place

        if self.round is None:
            in_proj, out_proj, fc1, bias1, fc2, bias2 = (parameters[i] for i in _CAST)
            in_proj, out_proj, fc1, fc2 = in_proj.t(), out_proj.t(), fc1.t(), fc2.t()
        else:
            self.round(in_proj, out_proj, fc1, fc1_bias, fc2, fc2_bias, base + 2 * self.weights)
            first, second, third, fourth, fifth, sixth, _ = (n + self.weights for n in self.starts)
            in_proj = work.as_strided((dim, inner), (1, dim), first)
            out_proj = work.as_strided((inner, dim), (1, inner), second)
            fc1 = work.as_strided((dim, hidden), (1, dim), third)
            bias1 = work.as_strided((hidden,), (1,), fourth)
            fc2 = work.as_strided((hidden, dim), (1, hidden), fifth)
            bias2 = work.as_strided((dim,), (1,), sixth)

        self.norm1(x, 0, 0, norm1, norm1_bias, 0, at(normed1), moments1, eps)
        torch.mm(self.matrix(slab, normed1, dim), in_proj, out=self.matrix(slab, before, inner))
        self.convolve(at(before), conv, conv_bias, at(given))
        self.prepare(x_proj, dt_projs, dt_bias, A_logs, D, at(kept))
        torch.mm(self.matrix(slab, given, inner),
                 slab.as_strided((inner, self.product), (1, inner), kept),
                 out=self.matrix(slab, projected, self.product))
        self.scan.run(at(projected), at(kept), (at(given),), base + 2 * self.wide, states, (),
                      base + 2 * self.memory)
        self.merge(base + 2 * self.wide, 0, merged, base + 2 * merging, out_norm, out_norm_bias,
                   moments, eps)
        torch.mm(self.matrix(work, merging, inner), out_proj, out=self.matrix(work, branch, dim))
        self.norm2(x, base + 2 * branch, scale1, norm2, norm2_bias, at(total), at(normed2),
                   moments2, eps)
        inside = self.matrix(slab, wide, hidden)
        torch.addmm(bias1, self.matrix(slab, normed2, dim), fc1, out=inside)
        active = inside if saved is None else self.matrix(work, self.wide, hidden)
        F.gelu(inside, out=active)
        torch.addmm(bias2, active, fc2, out=self.matrix(work, self.narrow, dim))
        self.add(at(total), base + 2 * self.narrow, scale2, 0, 0, result.data_ptr(), 0, 0, 0.0)


class _Backward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, dtypes):
        super().__init__(index, shape, widths, x_dtype, dtype, dtypes)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        batch, length, work = shape[0], self.length, self.plan.backward
        self.starts, self.round = self.cast(index, _CAST_BACK, dtypes, (
            inner * dim, dim * inner, hidden * dim, dim * hidden))
        parts, self.gelu = mlp.column_launch(index, dtype, True, pixels, hidden)
        self.sum1 = sum_launch(index, parts, 0, hidden, None, dtypes[15])
        most = parts * hidden
        parts, self.columns = mlp.column_launch(index, dtype, False, pixels, dim)
        self.sum2 = sum_launch(index, parts, 0, dim, None, dtypes[17])
        most = max(most, parts * dim)

        def norm_backward(branch, first):
            parts, launch = norm.backward_launch(index, dtype, x_dtype, branch, dtypes[first],
                                                 batch, length, dim)
            return 2 * parts * dim, launch, sum_launch(index, parts, 1, dim, dtypes[first],
                                                       dtypes[first + 1])

        size, self.norm2, self.sum_norm2 = norm_backward(dtype, 12)
        most = max(most, size)
        size, self.norm1, self.sum_norm1 = norm_backward(None, 0)
        most = max(most, size)
        self.merged_norm = norm.forward_launch(index, dtype, None, dtype, dtypes[9], batch, length,
                                               inner)
        sums, self.out_norm = norm.backward_launch(index, dtype, dtype, None, dtypes[9], batch,
                                                   length, inner)
        self.scan = scan.scan_launch(index, dtype, self.sizes, (self.fields,) * 2, True)
        self.merge = scan.merge_launch(index, dtype, self.sizes, True, True, None)
        self.finish = scan.finish_launch(index, dtype, self.sizes,
                                         dtypes[_SCAN] + dtypes[9:11], sums)
        most = max(most, work.spans * scan.columns_of(self.sizes))
        parts, self.convolve = dwconv.backward_launch(index, dtype, dtypes[3], dtypes[18],
                                                      *self.map)
        self.sum_conv = sum_launch(index, parts, 9, inner, dtypes[3], dtypes[18])
        most = max(most, 10 * parts * inner)
        self.transposed = dwconv.forward_launch(index, dtype, dtypes[3], None, False, *self.map)
        # Two maps of the MLP, or all of the scan's: then others take the place of what was read.
        mlps, _ = _places(pixels * hidden, pixels * hidden)
        scans, end = _places(pixels * inner, pixels * inner, pixels * inner,
                             work.maps * pixels * inner, work.columns * pixels * self.product,
                             self.scan.memory // 2)
        end = max(end, mlps[1] + pixels * hidden)
        places, self.size = _places(
            self.starts[-1], pixels * dim, pixels * dim, pixels * dim * x_dtype.itemsize // 2,
            2 * most, 4 * sums * inner, end)
        (self.weights, self.narrow, self.branch, self.dx, self.partials, self.sums, rest) = places
        self.inside, self.active = (rest + n for n in mlps)
        self.first, self.second, self.third, self.maps, self.dprojected, self.memory = (
            rest + n for n in scans)

    def __call__(self, grad, x, parameters, scales, saved, places, eps):
        """Gradients by x and the parameters, an empty one by a bias that is None."""
        dim, inner, hidden, dtype = self.dim, self.inner, self.hidden, self.dtype
        given, conv_bias = x, parameters[18]
        work = x.new_empty(self.size, dtype=dtype)
        base, start, x = work.data_ptr(), saved.data_ptr(), x.data_ptr()
        normed1, moments1, before, scanned, projected, kept, merged, total, normed2, moments2, \
            hidden_in = places
        pointers = [0 if t is None else t.data_ptr() for t in parameters]
        dx = given.new_empty(given.shape)
        grads = [parameters[0].new_empty(0) if t is None else
                 None if i in _CAST_BACK else t.new_empty(t.shape)
                 for i, t in enumerate(parameters)]
        results = [0 if t is None else t.data_ptr() for t in grads]
        partials, sums = base + 2 * self.partials, base + 2 * self.sums

        def at(place):
            return start + 2 * place

        def matrix(place, columns):
            return self.matrix(work, place, columns)

        def weight_grad(i, left, right):
            grads[i] = torch.mm(left.t(), right).to(parameters[i].dtype)

        if self.round is None:
            in_proj, out_proj, fc1, fc2 = (parameters[i] for i in _CAST_BACK)
        else:
            self.round(*[pointers[i] for i in _CAST_BACK], base + 2 * self.weights)
            in_proj, out_proj, fc1, fc2 = (
                work.as_strided(size, (size[1], 1), self.weights + n) for size, n in zip(
                    ((inner, dim), (dim, inner), (hidden, dim), (dim, hidden)), self.starts,
                    strict=False))

        branch = norm.scaled(grad, scales[1], dtype).view(-1, dim)
        inside, active = matrix(self.inside, hidden), matrix(self.active, hidden)
        torch.mm(branch, fc2, out=inside)
        self.gelu(base + 2 * self.inside, at(hidden_in), base + 2 * self.active, partials)
        self.sum1(partials, 0, results[15])
        weight_grad(16, branch, active)
        torch.mm(inside, fc1, out=matrix(self.narrow, dim))
        weight_grad(14, inside, self.matrix(saved, normed2, dim))
        self.columns(branch.data_ptr(), 0, 0, partials)
        self.sum2(partials, 0, results[17])
        others = grad.to(given.dtype)
        self.norm2(base + 2 * self.narrow, at(total), at(moments2), pointers[12],
                   others.data_ptr(), 0 if scales[0] is None else scales[0].data_ptr(),
                   base + 2 * self.dx, base + 2 * self.branch, partials)
        self.sum_norm2(partials, results[12], results[13])

        # What out_proj took is calculated again, from the map before its norm.
        branch, out, dout = (matrix(self.branch, dim), matrix(self.first, inner),
                             matrix(self.second, inner))
        self.merged_norm(at(merged), 0, 0, pointers[9], pointers[10], 0, base + 2 * self.first, 0,
                         eps)
        torch.mm(branch, out_proj, out=dout)
        weight_grad(11, branch, out)
        dy = base + 2 * self.third
        self.out_norm(base + 2 * self.second, at(merged), at(merged) + 2 * self.pixels * inner,
                      pointers[9], 0, 0, dy, 0, sums)
        self.scan.run(at(projected), at(kept), (at(scanned), dy), base + 2 * self.maps,
                      at(kept) + self.plan.offsets[-2], (base + 2 * self.dprojected, partials),
                      base + 2 * self.memory)
        columns = self.plan.backward.columns
        dprojected = work.as_strided((columns, self.pixels, self.product), (
            self.pixels * self.product, self.product, 1), self.dprojected)
        dprojected = dprojected[0] if columns == 1 else dprojected.sum(0)
        torch.mm(dprojected, saved.as_strided((self.product, inner), (inner, 1), kept), out=dout)
        dinner = base + 2 * self.second
        self.merge(base + 2 * self.maps, dinner, dinner, 0, 0, 0, 0, 0.0)
        product = torch.mm(dprojected.t(), self.matrix(saved, scanned, inner))
        self.finish(partials, product.data_ptr(), sums, *results[_SCAN], *results[9:11],
                    pointers[7])

        self.convolve(at(before), pointers[3], pointers[18], dinner, base + 2 * self.first,
                      partials)
        self.sum_conv(partials, results[3], 0 if conv_bias is None else results[18])
        self.transposed(base + 2 * self.first, pointers[3], 0, dy)
        dbefore = matrix(self.third, inner)
        weight_grad(2, dbefore, self.matrix(saved, normed1, dim))
        torch.mm(dbefore, in_proj, out=matrix(self.narrow, dim))
        self.norm1(base + 2 * self.narrow, x, at(moments1), pointers[0], base + 2 * self.dx, 0,
                   dx.data_ptr(), 0, partials)
        self.sum_norm1(partials, results[0], results[1])
        return dx, *grads


_forward_of, _backward_of = cached(_Forward), cached(_Backward)


def _key(x, parameters, dtype):
    routes, inner, rank = parameters[5].shape
    return ((x.get_device(), x.shape, (inner, parameters[14].shape[0], rank, routes), x.dtype,
             dtype), tuple([None if t is None else t.dtype for t in parameters]))


def _plain(parameters):
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in parameters]


def forward(x, parameters, scales, eps, dtype, out_dtype, save):
    """The result, and if ``save`` the slab for the backward, else None."""
    x, parameters = x.contiguous(), _plain(parameters)
    key, dtypes = _key(x, parameters, dtype)
    result = x.new_empty(x.shape, dtype=out_dtype)
    places, saved = None, None
    if save:
        places, size = saved_places(x, parameters)
        saved = x.new_empty(size, dtype=dtype)
    _forward_of(*key, out_dtype, dtypes, save)(x, parameters, scales, eps, result, saved, places)
    return result, saved


def backward(grad, x, parameters, scales, saved, eps):
    """Gradients by x and the parameters, an empty one by a bias that is None."""
    x, parameters = x.contiguous(), _plain(parameters)
    key, dtypes = _key(x, parameters, saved.dtype)
    return _backward_of(*key, dtypes)(grad.contiguous(), x, parameters, scales, saved,
                                      saved_places(x, parameters)[0], eps)
