"""``vss_block`` by the CUDA kernels of the ops that it is made of, and cuBLASLt.

A small batch waits for Python. So what depends on sizes and dtypes is worked out once, a call
deals in addresses, and maps lie in one or two slabs of memory, where one takes another's place.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops import cublas, walk
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
    if any(d not in walk.CODES for d in dtypes):  # sets are too much for Dynamo of torch 2.11
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if any(dtypes[i] not in (dtype, torch.float32) for i in _CAST):
        return f'a parameter of a matrix product is neither float32 nor {dtype}'
    if dtypes[0] != dtypes[1] or dtypes[9] != dtypes[10] or dtypes[12] != dtypes[13]:
        return 'weight and bias of a norm differ in dtype'
    return cublas.why_not()


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
        self.projected = routes * self.plan.row
        self.on_dim = index, batch, self.length, self.dim
        self.map = (self.length * self.inner, self.inner), (batch, height, width, self.inner)
        self.fields = (self.length * self.inner, self.inner, 1, 1, 0)  # of a map of the scan
        self.workspace_size = 0

    def norm(self, *dtypes):
        index, *shape = self.on_dim
        return norm.forward_launch(index, *dtypes, *shape)

    def product(self, *sizes, out_dtype=None, **kwargs):
        made = cublas.product(self.on_dim[0], self.dtype, out_dtype or self.dtype, *sizes, **kwargs)
        self.workspace_size = max(self.workspace_size, made.workspace // 2)
        return made.run

    def cast(self, parameters, dtypes, sizes):
        """Where the parameters begin in a slab, in bytes, and what rounds them there; None where
        all have the dtype."""
        if all(dtypes[i] == self.dtype for i in parameters):
            return 0, None
        starts, launch = mlp.cast_launch(self.on_dim[0], self.dtype, sizes,
                                         tuple(dtypes[i] for i in parameters))
        starts = [2 * start for start in starts]

        def run(addresses, to):
            launch(*addresses, to)
            return [to + start for start in starts[:-1]]

        return starts[-1] // 2, run


class _Forward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, out_dtype, dtypes, save):
        super().__init__(index, shape, widths, x_dtype, dtype, dtypes)
        dim, inner, hidden, pixels, plan = (self.dim, self.inner, self.hidden, self.pixels,
                                            self.plan)
        weights, self.round = self.cast(_CAST, dtypes, (
            inner * dim, dim * inner, hidden * dim, hidden, dim * hidden, dim))
        self.norm1 = self.norm(x_dtype, None, dtype, dtypes[0])
        self.in_proj = self.product(pixels, inner, dim, right_t=True)
        self.convolve = dwconv.forward_launch(index, dtype, dtypes[3], dtypes[18], True, *self.map)
        self.prepare = scan.prepare_launch(index, dtype, self.sizes, dtypes[_SCAN], True)
        self.project = self.product(pixels, self.projected, inner, right_t=True)
        self.scan = scan.scan_launch(index, dtype, self.sizes, (self.fields,), False)
        self.merge = scan.merge_launch(index, dtype, self.sizes, False, False, dtypes[9])
        self.out_proj = self.product(pixels, dim, inner, right_t=True)
        self.norm2 = self.norm(x_dtype, dtype, dtype, dtypes[12])
        self.fc1 = self.product(pixels, hidden, dim, right_t=True, bias=True)
        self.fc2 = self.product(pixels, dim, hidden, right_t=True, bias=True)
        self.add = self.norm(x_dtype, dtype, out_dtype, None)
        # Maps that take one another's place: the products' results; what the scan reads, and the
        # branch; the scan's maps, and what is hidden in the MLP.
        narrow, wide = pixels * max(dim, inner), pixels * max(plan.forward.maps * inner, hidden)
        (self.weights, self.workspace, self.memory, self.narrow, self.other, self.wide,
         *self.places), self.size = _places(
            weights, self.workspace_size, self.scan.memory // 2, narrow, narrow, wide,
            *() if save else (pixels * dim, pixels * self.projected, plan.offsets[-2] // 2,
                              pixels * dim * x_dtype.itemsize // 2))

    def __call__(self, x, parameters, scales, eps, result, saved, places):
        """Writes ``result``, and ``saved``, if it is there, at its ``places``."""
        slab = x.new_empty(self.size, dtype=self.dtype)
        base = slab.data_ptr()
        narrow, other, wide = base + 2 * self.narrow, base + 2 * self.other, base + 2 * self.wide
        workspace = base + 2 * self.workspace
        merged = moments1 = moments2 = moments = states = 0
        if saved is None:
            normed1, projected, kept, total = (base + 2 * n for n in self.places)
            normed2, before, given, inside = normed1, narrow, other, wide
        else:
            start = saved.data_ptr()
            (normed1, moments1, before, given, projected, kept, merged, total, normed2, moments2,
             inside) = (start + 2 * n for n in places)
            moments = merged + 2 * self.pixels * self.inner
            states = kept + self.plan.offsets[-2]
        (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
         out_norm_bias, out_proj, norm2, norm2_bias, fc1, bias1, fc2, bias2, conv_bias
         ) = [0 if t is None else t.data_ptr() for t in parameters]
        scale1, scale2 = (0 if scale is None else scale.data_ptr() for scale in scales)
        if self.round is not None:
            in_proj, out_proj, fc1, bias1, fc2, bias2 = self.round(
                (in_proj, out_proj, fc1, bias1, fc2, bias2), base + 2 * self.weights)
        x = x.data_ptr()

        self.norm1(x, 0, 0, norm1, norm1_bias, 0, normed1, moments1, eps)
        self.in_proj(normed1, in_proj, before, workspace)
        self.convolve(before, conv, conv_bias, given)
        self.prepare(x_proj, dt_projs, dt_bias, A_logs, D, kept)
        self.project(given, kept, projected, workspace)
        self.scan.run(projected, kept, (given,), wide, states, (), base + 2 * self.memory)
        self.merge(wide, 0, merged, narrow, out_norm, out_norm_bias, moments, eps)
        self.out_proj(narrow, out_proj, other, workspace)
        self.norm2(x, other, scale1, norm2, norm2_bias, total, normed2, moments2, eps)
        self.fc1(normed2, fc1, inside, workspace, bias1)
        size = self.pixels * self.hidden
        active = slab.as_strided((size,), (1,), self.wide)
        F.gelu(active if saved is None else saved.as_strided((size,), (1,), places[-1]), out=active)
        self.fc2(wide, fc2, narrow, workspace, bias2)
        self.add(total, narrow, scale2, 0, 0, result.data_ptr(), 0, 0, 0.0)


class _Backward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, dtypes):
        super().__init__(index, shape, widths, x_dtype, dtype, dtypes)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        batch, length, work = shape[0], self.length, self.plan.backward
        weights, self.round = self.cast(_CAST_BACK, dtypes, (
            inner * dim, dim * inner, hidden * dim, dim * hidden))

        self.fc2 = self.product(pixels, hidden, dim)
        parts, self.gelu = mlp.column_launch(index, dtype, True, pixels, hidden)
        jobs = [(parts, 0, hidden, None, dtypes[15])]
        self.dfc2 = self.product(dim, hidden, pixels, left_t=True, out_dtype=dtypes[16])
        self.fc1 = self.product(pixels, dim, hidden)
        self.dfc1 = self.product(hidden, dim, pixels, left_t=True, out_dtype=dtypes[14])
        parts, self.columns = mlp.column_launch(index, dtype, False, pixels, dim)
        jobs.append((parts, 0, dim, None, dtypes[17]))

        def norm_backward(branch, first):
            parts, launch = norm.backward_launch(index, dtype, x_dtype, branch, dtypes[first],
                                                 batch, length, dim)
            jobs.append((parts, 1, dim, *dtypes[first:first + 2]))
            return launch

        self.norm2 = norm_backward(dtype, 12)
        self.merged_norm = norm.forward_launch(index, dtype, None, dtype, dtypes[9], batch, length,
                                               inner)
        self.out_proj = self.product(pixels, inner, dim)
        self.dout_proj = self.product(dim, inner, pixels, left_t=True, out_dtype=dtypes[11])
        sums, self.out_norm = norm.backward_launch(index, dtype, dtype, None, dtypes[9], batch,
                                                   length, inner)
        self.scan = scan.scan_launch(index, dtype, self.sizes, (self.fields,) * 2, True)
        self.project = self.product(pixels, inner, self.projected)
        self.dproject = self.product(self.projected, inner, pixels, left_t=True)
        self.merge = scan.merge_launch(index, dtype, self.sizes, True, True, None)
        self.finish = scan.finish_launch(index, dtype, self.sizes,
                                         dtypes[_SCAN] + dtypes[9:11], sums)
        parts, self.convolve = dwconv.backward_launch(index, dtype, dtypes[3], dtypes[18],
                                                      *self.map)
        jobs.append((parts, 9, inner, dtypes[3], dtypes[18]))
        self.transposed = dwconv.forward_launch(index, dtype, dtypes[3], None, False, *self.map)
        self.din_proj = self.product(inner, dim, pixels, left_t=True, out_dtype=dtypes[2])
        self.in_proj = self.product(pixels, dim, inner)
        self.norm1 = norm_backward(None, 0)
        self.sum = sum_launch(index, *jobs)
        partials = [parts * (rows + 1) * width for parts, rows, width, *_ in jobs]
        # The scan's are summed before there are those of the convolution, the fourth.
        partials[3] = max(partials[3], work.spans * scan.columns_of(self.sizes))

        # Two maps of the MLP, then all of the scan's, of which others take the place later.
        mlps, end = _places(pixels * hidden, pixels * hidden)
        scans, other_end = _places(*[pixels * inner] * 3, work.maps * pixels * inner,
                                   work.columns * pixels * self.projected,
                                   self.projected * inner, self.scan.memory // 2)
        places, self.size = _places(
            weights, self.workspace_size, pixels * dim, pixels * dim,
            pixels * dim * x_dtype.itemsize // 2, *[2 * size for size in partials],
            4 * sums * inner, max(end, other_end))
        self.places = [2 * n for n in (*places[:-1], *(places[-1] + n for n in (*mlps, *scans)))]

    def __call__(self, grad, x, parameters, scales, saved, places, eps):
        """Gradients by x and the parameters, an empty one by a bias that is None."""
        slab = x.new_empty(self.size, dtype=self.dtype)
        base, start = slab.data_ptr(), saved.data_ptr()
        (weights, workspace, narrow, branch, dtotal, parts1, parts2, parts_norm2, parts_conv,
         parts_norm1, sums, inside, active, first, second, third, maps, dprojected, product,
         memory) = [base + n for n in self.places]
        (normed1, moments1, before, given, projected, kept, merged, total, normed2, moments2,
         hidden) = [start + 2 * n for n in places]
        (norm1, _, in_proj, conv, _, _, _, A_logs, _, out_norm, out_norm_bias, out_proj, norm2, _,
         fc1, _, fc2, _, conv_bias) = [0 if t is None else t.data_ptr() for t in parameters]
        dx = x.new_empty(x.shape)
        grads = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters]
        to = [t.data_ptr() for t in grads]
        if self.round is not None:
            in_proj, out_proj, fc1, fc2 = self.round((in_proj, out_proj, fc1, fc2), weights)
        others = grad.to(x.dtype)
        dbranch = norm.scaled(grad, scales[1], self.dtype)
        dsum = dbranch.data_ptr()

        self.fc2(dsum, fc2, inside, workspace)
        self.gelu(inside, hidden, active, parts1)
        self.dfc2(dsum, active, to[16], workspace)
        self.fc1(inside, fc1, narrow, workspace)
        self.dfc1(inside, normed2, to[14], workspace)
        self.columns(dsum, 0, 0, parts2)
        self.norm2(narrow, total, moments2, norm2, others.data_ptr(),
                   0 if scales[0] is None else scales[0].data_ptr(), dtotal, branch, parts_norm2)

        # What out_proj took is calculated again, from the map before its norm.
        self.merged_norm(merged, 0, 0, out_norm, out_norm_bias, 0, first, 0, eps)
        self.out_proj(branch, out_proj, second, workspace)
        self.dout_proj(branch, first, to[11], workspace)
        self.out_norm(second, merged, merged + 2 * self.pixels * self.inner, out_norm, 0, 0, third,
                      0, sums)
        self.scan.run(projected, kept, (given, third), maps, kept + self.plan.offsets[-2],
                      (dprojected, parts_conv), memory)
        if (columns := self.plan.backward.columns) > 1:
            size = self.pixels * self.projected
            parts = slab.as_strided((columns, size), (size, 1), (dprojected - base) // 2)
            together = parts.sum(0)
            dprojected = together.data_ptr()
        self.project(dprojected, kept, second, workspace)
        self.merge(maps, second, second, 0, 0, 0, 0, 0.0)
        self.dproject(dprojected, given, product, workspace)
        self.finish(parts_conv, product, sums, *to[_SCAN], *to[9:11], A_logs)

        self.convolve(before, conv, conv_bias, second, first, parts_conv)
        self.transposed(first, conv, 0, third)
        self.din_proj(third, normed1, to[2], workspace)
        self.in_proj(third, in_proj, narrow, workspace)
        self.norm1(narrow, x.data_ptr(), moments1, norm1, dtotal, 0, dx.data_ptr(), 0, parts_norm1)
        self.sum(parts1, 0, to[15], parts2, 0, to[17], parts_norm2, to[12], to[13],
                 parts_conv, to[3], to[18], parts_norm1, to[0], to[1])
        return dx, *grads


_forward_of, _backward_of = cached(_Forward), cached(_Backward)


def _key(x, parameters, dtype):
    routes, inner, rank = parameters[5].shape
    return ((x.get_device(), x.shape, (inner, parameters[14].shape[0], rank, routes), x.dtype,
             dtype), tuple([None if t is None else t.dtype for t in parameters]))


def _plain(t):
    """A tensor as kernels and products take it: without gaps, at a multiple of 16 bytes."""
    if t is None or t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def forward(x, parameters, scales, eps, dtype, out_dtype, save):
    """The result, and if ``save`` the slab for the backward, else None."""
    x, parameters = _plain(x), [_plain(t) for t in parameters]
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
    x, parameters = _plain(x), [_plain(t) for t in parameters]
    key, dtypes = _key(x, parameters, saved.dtype)
    return _backward_of(*key, dtypes)(_plain(grad), x, parameters, scales, saved,
                                      saved_places(x, parameters)[0], eps)
