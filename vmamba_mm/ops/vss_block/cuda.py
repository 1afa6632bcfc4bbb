"""``vss_block`` by the CUDA kernels of the ops that it is made of, and cuBLASLt.

A small batch waits for Python. So what depends on sizes and dtypes is worked out once, a call
deals in addresses, and maps lie in one or two slabs of memory, where one takes another's place.
"""

from itertools import accumulate

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.nvrtc import cached
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import cast_launch, plan_cast
from vmamba_mm.ops.fused.channels import WIDEST, sum_launch
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.scan_kernels import cuda as walk
from vmamba_mm.ops.vss_block import scan

#: of a block, in this order: weights and biases of norm1, in_proj, conv, x_proj, dt_projs, the
#: latter's bias, A_logs, D, of out_norm, out_proj, of norm2, of fc1, of fc2, and the convolution's
#: bias
_CAST, _CAST_BACK = (2, 11, 14, 15, 16, 17), (2, 11, 14, 16)
_SCAN, _OUT_NORM, _ALL = slice(4, 9), slice(9, 11), 19


def why_not(x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> str | None:
    """What keeps ``vss_block`` from taking these inputs, or None; ``tensors`` are its parameters
    without the bias of the convolution."""
    in_proj, x_proj, dt_projs, hidden = tensors[2], tensors[4], tensors[5], tensors[14]
    if (reason := walk.why_not(x, dt_projs.shape[2], 1)) is not None:
        return reason
    dim, inner, wide = x.shape[3], in_proj.shape[0], hidden.shape[0]
    if dtype not in walk.CODES or x_proj.shape[1] != dt_projs.shape[2] + 2:
        return 'it takes a state of 1 and matrix products in float32, float16 or bfloat16'
    if dim % 4 or inner % 4 or wide % 4 or max(dim, inner) > WIDEST:
        return f'{dim} channels, {inner} inner and {wide} hidden ones: it takes multiples of 4 ' \
               f'up to {WIDEST}'
    if x.shape[1] * x.shape[2] * inner >= 2**31:
        return 'a sample has 2^31 elements or more'
    dtypes = [t.dtype for t in tensors]
    if any(d not in walk.CODES for d in dtypes):  # sets are too much for Dynamo of torch 2.11
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if dtype == torch.float32 and any(d != dtype for d in (x.dtype, *dtypes)):
        return 'matrix products in float32 are for a map and parameters in float32'
    if any(dtypes[i] not in (dtype, torch.float32) for i in _CAST):
        return f'a parameter of a matrix product is neither float32 nor {dtype}'
    if dtypes[0] != dtypes[1] or dtypes[9] != dtypes[10] or dtypes[12] != dtypes[13]:
        return 'weight and bias of a norm differ in dtype'
    return gemm.why_not()


def saved_size(x: Tensor, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that a forward keeps in its slab for the backward."""
    return _saved(x.shape, _widths(parameters), x.dtype, dtype)[1]


def _widths(parameters):
    """Inner channels, hidden ones, rank and routes."""
    routes, inner, rank = parameters[5].shape
    return inner, parameters[14].shape[0], rank, routes


def _saved(shape, widths, x_dtype, dtype):
    """Where in that slab each part begins, and its size, in elements: normed1 and its moments, what
    the convolution and the scan take, the projected input, what the scan keeps, the map before its
    norm and its moments, the sum and its norm with moments, GELU's input."""
    batch, height, width, dim = shape
    inner, hidden, rank, routes = widths
    pixels = batch * height * width
    row, *kept = scan.kept_sizes(dtype, (batch, inner, height, width, rank, routes))
    moments = 8 // dtype.itemsize * pixels
    return _places(pixels * dim, moments, pixels * inner, pixels * inner, pixels * routes * row,
                   sum(kept), pixels * inner + moments,
                   pixels * dim * x_dtype.itemsize // dtype.itemsize, pixels * dim, moments,
                   pixels * hidden)


def _places(*sizes: int) -> tuple[list[int], int]:
    """Where in a slab each begins, at a multiple of 128 elements, and where the last ends."""
    *starts, end = accumulate((-(-size // 128) * 128 for size in sizes), initial=0)
    return starts, end


class _Launches:
    """What a forward and a backward share, for these sizes and dtypes."""

    def __init__(self, index, shape, widths, x_dtype, dtype, tf32):
        batch, height, width, self.dim = shape
        self.inner, self.hidden, rank, routes = widths
        self.dtype, self.unit, self.tf32 = dtype, dtype.itemsize, tf32
        self.residual = x_dtype.itemsize // self.unit
        self.length = height * width
        self.pixels = batch * self.length
        self.sizes = (batch, self.inner, height, width, rank, routes)
        self.on_dim = index, batch, self.length, self.dim
        self.map = (self.length * self.inner, self.inner), (batch, height, width, self.inner)
        self.saved, self.saved_size = _saved(shape, widths, x_dtype, dtype)
        self.workspace_size = 0

    def norm(self, *dtypes):
        index, *shape = self.on_dim
        return norm.forward_launch(index, *dtypes, *shape)

    def product(self, *sizes, out_dtype=None, **kwargs):
        made = gemm.product(self.on_dim[0], self.dtype, out_dtype or self.dtype, *sizes,
                              tf32=self.tf32, **kwargs)
        self.workspace_size = max(self.workspace_size, made.workspace // self.unit)
        return made.run


class _Forward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, tf32, out_dtype, dtypes, save):
        super().__init__(index, shape, widths, x_dtype, dtype, tf32)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        casts, self.starts = ((), ()), ()
        if any(dtypes[i] != dtype for i in _CAST):
            casts = ((inner * dim, dim * inner, hidden * dim, hidden, dim * hidden, dim),
                     tuple(dtypes[i] for i in _CAST))
            self.starts = plan_cast(*casts)[0]
        self.norm1 = self.norm(x_dtype, None, dtype, dtypes[0])
        self.in_proj = self.product(pixels, inner, dim, right_t=True)
        self.convolve = dwconv.forward_launch(index, dtype, dtypes[3], dtypes[18], True, *self.map)
        self.scan = scan.forward_of(dtype)(
            index, dtype, self.sizes, dtypes[_SCAN] + dtypes[_OUT_NORM], self.product, casts)
        self.out_proj = self.product(pixels, dim, inner, right_t=True)
        self.norm2 = self.norm(x_dtype, dtype, dtype, dtypes[12])
        self.fc1 = self.product(pixels, hidden, dim, right_t=True, bias=True)
        self.gelu = mlp.gelu_launch(index, dtype, pixels * hidden)
        self.fc2 = self.product(pixels, dim, hidden, right_t=True, bias=True)
        self.join = self.norm(x_dtype, dtype, dtype, dtypes[0])
        self.add = self.norm(x_dtype, dtype, out_dtype, None)
        # Maps that take one another's place: the products' results; what the scan reads, and the
        # branch; the scan's maps, and what is hidden in the MLP.
        narrow, wide = pixels * max(dim, inner), pixels * max(self.scan.maps * inner, hidden)
        (self.weights, self.workspace, self.memory, self.narrow, self.other, self.wide,
         *self.places), self.size = _places(
            sum(self.starts[-1:]), self.workspace_size, self.scan.memory, narrow, narrow, wide,
            *() if save else (pixels * dim, pixels * self.scan.columns,
                              self.scan.states // self.unit, pixels * dim * self.residual))

    def __call__(self, x, addresses, scales, eps, result, saved):
        """Writes ``result``, and ``saved``, if it is there; ``addresses`` of the parameters of a
        block, or without ``saved`` of several."""
        slab = x.new_empty(self.size, dtype=self.dtype)
        at = (*_addresses(x, slab, result, saved, *scales), *addresses)
        replay(self.on_dim[0], (self, eps, at), lambda: self._launch(eps, *at))

    def _launch(self, eps, x, base, result, start, scale1, scale2, *addresses):
        unit = self.unit
        narrow, other, wide, workspace, memory = [base + unit * n for n in (
            self.narrow, self.other, self.wide, self.workspace, self.memory)]
        merged = moments1 = moments2 = moments = 0
        if not start:
            normed1, projected, kept, total = [base + unit * n for n in self.places]
            normed2, before, given, inside = normed1, narrow, other, wide
        else:
            (normed1, moments1, before, given, projected, kept, merged, total, normed2, moments2,
             inside) = [start + unit * n for n in self.saved]
            moments = merged + unit * self.pixels * self.inner
        for i in range(0, len(addresses), _ALL):
            (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
             out_norm_bias, out_proj, norm2, norm2_bias, fc1, bias1, fc2, bias2,
             conv_bias) = addresses[i:i + _ALL]
            scans, products = (x_proj, dt_projs, dt_bias, A_logs, D), ()
            if self.starts:
                to = base + unit * self.weights
                products = in_proj, out_proj, fc1, bias1, fc2, bias2, to
                in_proj, out_proj, fc1, bias1, fc2, bias2 = [
                    to + unit * n for n in self.starts[:-1]]
            self.scan.prepare(*scans, kept, memory, *products)

            if i == 0:
                self.norm1(x, 0, 0, norm1, norm1_bias, 0, normed1, moments1, eps)
            else:  # the end of the block before and the beginning of this one
                self.join(total, narrow, 0, norm1, norm1_bias, total, normed1, 0, eps)
                x = total
            self.in_proj(normed1, in_proj, before, workspace)
            self.convolve(before, conv, conv_bias, given)
            self.scan.run(scans, given, projected, kept, wide, start != 0, memory, workspace)
            self.scan.merge(wide, 0, merged, narrow, out_norm, out_norm_bias, moments, eps)
            self.out_proj(narrow, out_proj, other, workspace)
            self.norm2(x, other, scale1, norm2, norm2_bias, total, normed2, moments2, eps)
            self.fc1(normed2, fc1, inside, workspace, bias1)
            self.gelu(inside, wide)
            self.fc2(wide, fc2, narrow, workspace, bias2)
        self.add(total, narrow, scale2, 0, 0, result, 0, 0, 0.0)


class _Backward(_Launches):
    def __init__(self, index, shape, widths, x_dtype, dtype, tf32, dtypes):
        super().__init__(index, shape, widths, x_dtype, dtype, tf32)
        dim, inner, hidden, pixels = self.dim, self.inner, self.hidden, self.pixels
        batch, length = shape[0], self.length
        weights, self.round = self._cast(_CAST_BACK, dtypes, (
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
        self.scan = scan.backward_of(dtype)(
            index, dtype, self.sizes, dtypes[_SCAN] + dtypes[_OUT_NORM], sums, self.product)
        parts, self.convolve = dwconv.backward_launch(index, dtype, dtypes[3], dtypes[18],
                                                      *self.map)
        jobs.append((parts, 9, inner, dtypes[3], dtypes[18]))
        self.transposed = dwconv.forward_launch(index, dtype, dtypes[3], None, False, *self.map)
        self.din_proj = self.product(inner, dim, pixels, left_t=True, out_dtype=dtypes[2])
        self.in_proj = self.product(pixels, dim, inner)
        self.norm1 = norm_backward(None, 0)
        self.sum = sum_launch(index, *jobs, *self.scan.jobs)
        partials = [parts * (rows + 1) * width for parts, rows, width, *_ in jobs]
        # The scan's are summed before there are those of the convolution, the fourth.
        partials[3] = max(partials[3], self.scan.partials)

        # Two maps of the MLP, then all of the scan's, of which others take the place later.
        projected = pixels * self.scan.columns
        mlps, end = _places(pixels * hidden, pixels * hidden)
        scans, other_end = _places(*[pixels * inner] * 3, self.scan.maps * pixels * inner,
                                   self.scan.parts * projected, self.scan.product,
                                   self.scan.memory, projected if self.scan.parts > 1 else 0)
        single = 4 // self.unit
        places, self.size = _places(
            weights, self.workspace_size, pixels * dim, pixels * dim,
            pixels * dim * self.residual, *[single * size for size in partials],
            2 * single * sums * inner, max(end, other_end))
        self.places = [self.unit * n for n in (*places[:-1],
                                               *(places[-1] + n for n in (*mlps, *scans)))]
        # torch may need memory of its own to sum more.
        self.graphs = self.scan.parts * projected * self.unit < 2**31

    def _cast(self, parameters, dtypes, sizes):
        """Where the parameters begin in a slab, in bytes, and what rounds them there; None where
        all have the dtype."""
        if all(dtypes[i] == self.dtype for i in parameters):
            return 0, None
        starts, launch = cast_launch(self.on_dim[0], self.dtype, sizes,
                                     tuple(dtypes[i] for i in parameters))
        starts = [self.unit * start for start in starts]

        def run(addresses, to):
            launch(*addresses, to)
            return [to + start for start in starts[:-1]]

        return starts[-1] // self.unit, run

    def __call__(self, grad, x, parameters, addresses, scales, saved, eps):
        """Gradients by x and the parameters, an empty one by a bias that is None."""
        slab = x.new_empty(self.size, dtype=self.dtype)
        dx = torch.empty_like(x)
        grads = [x.new_empty(0) if t is None else torch.empty_like(t) for t in parameters]
        others, dbranch = grad.to(x.dtype), norm.scaled(grad, scales[1], self.dtype)
        at = (*_addresses(x, slab, saved, others, dbranch, dx, scales[0]), *addresses)
        to = _addresses(*grads)

        def launch():
            self._launch(eps, slab, to, *at)

        if self.graphs:
            replay(self.on_dim[0], (self, eps, at, to), launch)
        else:
            launch()
        return dx, *grads

    def _launch(self, eps, slab, to, x, base, start, others, dsum, dx, scale, *addresses):
        (weights, workspace, narrow, branch, dtotal, parts1, parts2, parts_norm2, parts_conv,
         parts_norm1, sums, inside, active, first, second, third, maps, dprojected, product,
         memory, together) = [base + n for n in self.places]
        (normed1, moments1, before, given, projected, kept, merged, total, normed2, moments2,
         hidden) = [start + self.unit * n for n in self.saved]
        (norm1, _, in_proj, conv, *scans, out_norm, out_norm_bias, out_proj, norm2, _, fc1, _, fc2,
         _, conv_bias) = addresses
        if self.round is not None:
            in_proj, out_proj, fc1, fc2 = self.round((in_proj, out_proj, fc1, fc2), weights)

        self.fc2(dsum, fc2, inside, workspace)
        self.gelu(inside, hidden, active, parts1)
        self.dfc2(dsum, active, to[16], workspace)
        self.fc1(inside, fc1, narrow, workspace)
        self.dfc1(inside, normed2, to[14], workspace)
        self.columns(dsum, 0, 0, parts2)
        self.norm2(narrow, total, moments2, norm2, others, scale, dtotal, branch, parts_norm2)

        # What out_proj took is calculated again, from the map before its norm.
        self.merged_norm(merged, 0, 0, out_norm, out_norm_bias, 0, first, 0, eps)
        self.out_proj(branch, out_proj, second, workspace)
        self.dout_proj(branch, first, to[11], workspace)
        moments = merged + self.unit * self.pixels * self.inner
        self.out_norm(second, merged, moments, out_norm, 0, 0, third, 0, sums)
        self.scan.run(given, third, projected, kept, maps, dprojected, parts_conv, memory)
        if self.scan.parts > 1:
            size = self.pixels * self.scan.columns
            parts, whole = ((place - base) // self.unit for place in (dprojected, together))
            torch.sum(slab.as_strided((self.scan.parts, size), (size, 1), parts), 0,
                      out=slab.as_strided((size,), (1,), whole))
            dprojected = together
        self.scan.end(scans, given, kept, maps, dprojected, parts_conv, product, sums, second,
                      to[_SCAN] + to[_OUT_NORM], workspace)

        self.convolve(before, conv, conv_bias, second, first, parts_conv)
        self.transposed(first, conv, 0, third)
        self.din_proj(third, normed1, to[2], workspace)
        self.in_proj(third, in_proj, narrow, workspace)
        self.norm1(narrow, x, moments1, norm1, dtotal, 0, dx, 0, parts_norm1)
        self.sum(parts1, 0, to[15], parts2, 0, to[17], parts_norm2, to[12], to[13],
                 parts_conv, to[3], to[18], parts_norm1, to[0], to[1],
                 *(sums, to[9], to[10])[:3 * len(self.scan.jobs)])


_forward_of, _backward_of = cached(_Forward), cached(_Backward)


def _key(x, parameters, dtype):
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return ((x.get_device(), x.shape, _widths(parameters), x.dtype, dtype, tf32),
            tuple([None if t is None else t.dtype for t in parameters]))


def _addresses(*tensors):
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def _plain(*tensors):
    """Tensors, or None, as kernels and products take them, without gaps and at a multiple of 16
    bytes; and where they are."""
    tensors, addresses = list(tensors), list(_addresses(*tensors))
    for i, (t, address) in enumerate(zip(tensors, addresses, strict=True)):
        if address % 16 or address and not t.is_contiguous():
            tensors[i] = t.clone(memory_format=torch.contiguous_format)
            addresses[i] = tensors[i].data_ptr()
    return tensors, addresses


def forward(x, parameters, scales, eps, dtype, out_dtype, save):
    """The result, and if ``save`` the slab for the backward, else None; ``parameters`` of one block
    after the other, all in the same dtypes, more than one without ``save`` and ``scales``."""
    (x, *parameters), (_, *addresses) = _plain(x, *parameters)
    key, dtypes = _key(x, parameters[:_ALL], dtype)
    result = x.new_empty(x.shape, dtype=out_dtype)
    launches = _forward_of(*key, out_dtype, dtypes, save)
    saved = x.new_empty(launches.saved_size, dtype=dtype) if save else None
    launches(x, addresses, scales, eps, result, saved)
    return result, saved


def backward(grad, x, parameters, scales, saved, eps):
    """Gradients by x and the parameters, an empty one by a bias that is None."""
    (grad, x, *parameters), (_, _, *addresses) = _plain(grad, x, *parameters)
    key, dtypes = _key(x, parameters, saved.dtype)
    return _backward_of(*key, dtypes)(grad, x, parameters, addresses, scales, saved, eps)
