"""``rmt_block`` by the CUDA kernels of the ops that it is made of, and cuBLASLt: the forward, and
what it shares with the backward (:mod:`vmamba_mm.ops.rmt_block.backward`).

Training waits for Python as soon as a GPU is quick. So what depends on sizes and dtypes is worked
out once, a call deals in addresses, and maps lie in one or two slabs of memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core import gemm
from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import CODES, Slab, aligned, cached, why_not_beside
from vmamba_mm.ops.fused import layer_scale
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import WIDEST
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp.hidden import hidden_launch
from vmamba_mm.ops.mamba_blocks.cuda import FACTOR, gather_launch
from vmamba_mm.ops.masa import cuda as masa
from vmamba_mm.ops.masa import lepe
from vmamba_mm.ops.rmt_block.weights import Weights

SINGLE = torch.float32


def why_not(x: Tensor, weights: Weights, decay: Tensor, turns: Tensor, whole: bool,
            dtype: torch.dtype) -> str | None:
    """The reason why ``rmt_block`` cannot take these inputs, or None."""
    if not _fit(x, weights, decay, turns):
        return 'the shapes of its inputs do not fit one another'
    heads = decay.shape[0]
    shape = (*x.shape[:3], heads, x.shape[3] // heads)
    if (reason := masa.why_not_shape(x, shape, whole)) is not None:
        return reason
    if (reason := why_not_beside(x, *weights, decay, turns)) is not None:
        return reason
    if wants_grad(decay, turns) or not decay.dtype == turns.dtype == SINGLE:
        return 'decay and turns are not float32, or a gradient by them is wanted'
    dim, hidden = x.shape[3], weights.fc1.shape[0]
    if hidden % 4 or max(dim, hidden) > WIDEST:
        return f'{dim} channels and {hidden} hidden ones: it takes multiples of 4 up to {WIDEST}'
    if dtype not in CODES:
        return 'it takes matrix products in float32, float16 or bfloat16'
    dtypes = [t.dtype for t in weights if t is not None]
    if all([d == dtypes[0] for d in dtypes]):  # mostly, and training waits for the questions
        dtypes = dtypes[:1]
    if dtype == SINGLE and any([d != dtype for d in (x.dtype, *dtypes)]):
        return 'matrix products in float32 are for a map and parameters in float32'
    if any([t.dtype not in (dtype, SINGLE) for t in _factors(weights)[:6]]):
        return f'a parameter of a matrix product is neither float32 nor {dtype}'
    if weights.norm1.dtype != weights.norm1_bias.dtype \
            or weights.norm2.dtype != weights.norm2_bias.dtype:
        return 'weight and bias of a norm differ in dtype'
    return gemm.why_not()


def _fit(x: Tensor, w: Weights, decay: Tensor, turns: Tensor) -> bool:
    """Whether a map, weights and places are of one block; a user may have changed some."""
    dim, hidden = x.shape[-1], w.fc1.shape[0]
    height, width, pairs, _ = turns.shape
    return (x.dim() == 4 and (height, width, 2 * pairs * decay.shape[0]) == (*x.shape[1:3], dim)
            and w.q.shape == w.k.shape == w.v.shape == w.out.shape == (dim, dim)
            and w.fc1.shape[1] == dim and w.fc2.shape == (dim, hidden)
            and w.conv.shape[0] == hidden
            and w.pos.shape[0] == w.lepe.shape[0] == w.norm1.shape[0] == w.norm2.shape[0] == dim)


def _factors(w: Weights) -> tuple:
    """The parameters of the matrix products, weights before biases."""
    return (w.q, w.k, w.v, w.out, w.fc1, w.fc2,
            w.q_bias, w.k_bias, w.v_bias, w.out_bias, w.fc1_bias, w.fc2_bias)


class Sizes(NamedTuple):
    """Of the map and a block."""
    batch: int
    height: int
    width: int
    dim: int
    hidden: int  # of the MLP
    heads: int

    @property
    def length(self) -> int:
        return self.height * self.width


class Saved(NamedTuple):
    """What a forward writes that the backward reads, as offsets in bytes or as addresses."""
    placed: int      # x and its convolution, in the dtype of x
    moments1: int    # mean and 1 / deviation of each pixel before a norm, fp32
    normed1: int
    qkv: int         # (B, H, W, 3C)
    rows: int        # what comes of the rows of 'decomposed'
    mixed: int       # attention and the convolution beside it
    branch1: int     # before layer scale, if there is any
    total: int       # the sum after the first branch, in the dtype of x
    moments2: int
    normed2: int
    gelu_input: int
    convolved: int   # what fc2 takes
    branch2: int     # as branch1


def _lay_out_saved(sizes: Sizes, whole: bool, x_itemsize: int, itemsize: int, scaled: bool
                   ) -> tuple[Saved, int]:
    """The offsets in the slab for the backward, and its size; sizes are symbols where torch.compile
    takes maps of any size."""
    slab, pixels = Slab(), sizes.batch * sizes.length
    narrow, wide = pixels * sizes.dim, pixels * sizes.hidden
    # In the order of the fields.
    return Saved(
        slab.take(narrow, x_itemsize), slab.take(2 * pixels), slab.take(narrow, itemsize),
        slab.take(3 * narrow, itemsize), slab.take(narrow * int(not whole), itemsize),
        slab.take(narrow, itemsize), slab.take(narrow * int(scaled), itemsize),
        slab.take(narrow, x_itemsize), slab.take(2 * pixels), slab.take(narrow, itemsize),
        slab.take(wide, itemsize), slab.take(wide, itemsize),
        slab.take(narrow * int(scaled), itemsize)), slab.size


def sizes_of(x: Tensor, weights: Weights, decay: Tensor) -> Sizes:
    return Sizes(*x.shape, weights.fc1.shape[0], decay.shape[0])


def saved_size(x: Tensor, weights: Weights, decay: Tensor, whole: bool, dtype: torch.dtype) -> int:
    """Bytes that a forward keeps for the backward beside the inputs."""
    return _lay_out_saved(sizes_of(x, weights, decay), whole, x.dtype.itemsize, dtype.itemsize,
                          weights.gamma1 is not None or weights.gamma2 is not None)[1]


class Factors(NamedTuple):
    """Addresses of the parameters of matrix products in their dtype, and in a forward of the
    biases."""
    qkv: int  # (3C, C)
    out: int
    fc1: int
    fc2: int
    qkv_bias: int = 0
    out_bias: int = 0
    fc1_bias: int = 0
    fc2_bias: int = 0


class Launches:
    """The launches that a forward and a backward share, for these sizes and dtypes."""

    def __init__(self, index: int, sizes: Sizes, whole: bool, x_dtype: torch.dtype,
                 dtype: torch.dtype, tf32: bool, dtypes: tuple[torch.dtype | None, ...]):
        self.index, self.sizes, self.whole, self.tf32 = index, sizes, whole, tf32
        self.x_dtype, self.dtype, self.dtypes = x_dtype, dtype, Weights._make(dtypes)
        self.pixels, self.dim, self.hidden = (
            sizes.batch * sizes.length, sizes.dim, sizes.hidden)
        # Strides of a map from an image and a pixel to the next, and its shape.
        self.map, self.hidden_map = (
            ((sizes.length * width, width), (*sizes[:3], width))
            for width in (sizes.dim, sizes.hidden))
        scaled = self.dtypes.gamma1 is not None or self.dtypes.gamma2 is not None
        self.saved, self.saved_size = _lay_out_saved(sizes, whole, x_dtype.itemsize,
                                                     dtype.itemsize, scaled)
        self.slab, self.workspace_size = Slab(), 0
        # From queries to keys, and from those to values.
        self.step = self.dim * dtype.itemsize

    def take(self, columns: int, dtype: torch.dtype | None = None) -> int:
        """A part of the slab for a map of so many channels."""
        return self.slab.take(self.pixels * columns, (dtype or self.dtype).itemsize)

    def norm(self, x, branch, out, weight):
        return norm.forward_launch(self.index, x, branch, out, weight, self.sizes.batch,
                                   self.sizes.length, self.dim)

    def product(self, *sizes, out_dtype=None, **kwargs):
        return self.with_workspace(gemm.product(
            self.index, self.dtype, out_dtype or self.dtype, *sizes, tf32=self.tf32, **kwargs))

    def with_workspace(self, product):
        self.workspace_size = max(self.workspace_size, product.workspace)
        return product.run

    def attend(self, direction: str, kind: int, v_pixel: int, **constants):
        """All lines of one kind: with queries and keys in rows of (B, H, W, 3C)."""
        shape = (*self.sizes[:3], self.sizes.heads, self.dim // self.sizes.heads)
        return masa.launch(self.index, direction, self.dtype, shape, kind, q_pixel=3 * self.dim,
                           k_pixel=3 * self.dim, v_pixel=v_pixel, **constants)

    def gather(self, biases: bool):
        """A launch that brings the parameters of products together, in their dtype, and their
        offsets. It takes the addresses of :func:`_factors` and of the slab."""
        dim, hidden, slab, itemsize = self.dim, self.hidden, self.slab, self.dtype.itemsize
        square = dim * dim
        sizes = [square] * 4 + [dim * hidden] * 2 + ([dim] * 4 + [hidden, dim]) * biases
        qkv = slab.take(3 * square, itemsize)
        offsets = [qkv, qkv + square * itemsize, qkv + 2 * square * itemsize,
                   *[slab.take(size, itemsize) for size in sizes[3:6]]]
        if biases:
            qkv_bias = slab.take(3 * dim, itemsize)
            offsets += [qkv_bias, qkv_bias + dim * itemsize, qkv_bias + 2 * dim * itemsize,
                        *[slab.take(size, itemsize) for size in sizes[9:]]]
        launch = gather_launch(self.index, self.dtype, sizes, _factors(self.dtypes)[:len(sizes)],
                               [FACTOR] * len(sizes), offsets)

        def run(weights: Weights, base: int):
            launch(_factors(weights)[:len(sizes)], base)

        return run, Factors(offsets[0], *offsets[3:7], *offsets[9:])


class _Forward(Launches):
    def __init__(self, *key, save):
        super().__init__(*key)
        index, dtype, w, dim, hidden = self.index, self.dtype, self.dtypes, self.dim, self.hidden
        x_dtype, pixels, self.save = self.x_dtype, self.pixels, save
        self.bring, self.factors = self.gather(True)
        self.place = dwconv.forward_launch(index, x_dtype, w.pos, w.pos_bias, True, *self.map,
                                           dwconv.ADD)
        self.norm1 = self.norm(x_dtype, None, dtype, w.norm1)
        self.qkv = self.product(pixels, 3 * dim, dim, right_t=True, bias=True)
        if self.whole:
            self.plane = self.attend('fwd', masa.WHOLE, 3 * dim)
        else:
            self.rows = self.attend('fwd', masa.ROWS, 3 * dim)
            self.columns = self.attend('fwd', masa.COLUMNS, dim)
        self.lepe = lepe.launch(index, dtype, True, w.lepe, w.lepe_bias, self.map[1], 3 * dim, dim,
                                dim)
        self.out = self.product(pixels, dim, dim, right_t=True, bias=True)
        self.scale1, self.scale2 = (
            layer_scale.forward_launch(index, dtype, gamma, pixels, dim) if gamma else None
            for gamma in (w.gamma1, w.gamma2))
        self.norm2 = self.norm(x_dtype, SINGLE if w.gamma1 else dtype, dtype, w.norm2)
        self.fc1 = self.with_workspace(
            hidden_launch(index, dtype, pixels, hidden, dim, self.tf32))
        self.convolve = dwconv.forward_launch(index, dtype, w.conv, w.conv_bias, True,
                                              *self.hidden_map, dwconv.ADD)
        self.fc2 = self.product(pixels, dim, hidden, right_t=True, bias=True)
        self.add = self.norm(x_dtype, SINGLE if w.gamma2 else dtype, x_dtype, None)

        # Maps take one another's place: a branch that of what is not read any more, what is hidden
        # in the MLP that of queries, keys and values.
        self.workspace_at, self.narrow_at = self.slab.take(self.workspace_size, 1), self.take(dim)
        self.scaled_at = self.take(dim, SINGLE) if w.gamma1 or w.gamma2 else 0
        if save:
            self.hidden_at = self.take(hidden)
        else:
            self.hidden_at, other = self.take(max(3 * dim, hidden)), self.take(dim)
            placed, narrow, wide = self.take(dim, x_dtype), self.narrow_at, self.hidden_at
            self.saved = Saved(
                placed, moments1=0, normed1=narrow, qkv=wide, rows=narrow, mixed=other,
                branch1=narrow, total=placed, moments2=0, normed2=other, gelu_input=wide,
                convolved=self.take(hidden), branch2=narrow)

    def launch(self, eps, x, slab, result, saved, decay, turns, scale1, scale2, *addresses):
        """On addresses; ``saved`` is 0 if nothing is."""
        w, start = Weights._make(addresses), saved if self.save else slab
        saved = Saved(*[start + at for at in self.saved])
        factors = Factors(*[slab + at for at in self.factors])
        workspace, narrow, scaled = (slab + self.workspace_at, slab + self.narrow_at,
                                     slab + self.scaled_at)
        moments1, moments2 = (saved.moments1, saved.moments2) if self.save else (0, 0)
        self.bring(w, slab)

        self.place(x_data=x, weight=w.pos, bias=w.pos_bias, y=saved.placed)
        self.norm1(x=saved.placed, weight=w.norm1, bias=w.norm1_bias, normed=saved.normed1,
                   moments=moments1, eps=eps)
        self.qkv(saved.normed1, factors.qkv, saved.qkv, workspace, factors.qkv_bias)
        q, k, v = saved.qkv, saved.qkv + self.step, saved.qkv + 2 * self.step
        places = dict(lines_decay=decay, lines_turns=turns)
        if self.whole:
            self.plane(q_data=q, k_data=k, v_data=v, y=saved.mixed, **places)
        else:
            self.rows(q_data=q, k_data=k, v_data=v, y=saved.rows, **places)
            self.columns(q_data=q, k_data=k, v_data=saved.rows, y=saved.mixed, **places)
        self.lepe(x_data=v, more_data=saved.mixed, weight=w.lepe, bias=w.lepe_bias, y=saved.mixed)
        branch = saved.branch1 if self.scale1 else narrow
        self.out(saved.mixed, factors.out, branch, workspace, factors.out_bias)
        if self.scale1:
            self.scale1(branch=branch, gamma=w.gamma1, scaled=scaled)
            branch = scaled
        self.norm2(x=saved.placed, branch=branch, scale=scale1, weight=w.norm2, bias=w.norm2_bias,
                   sum=saved.total, normed=saved.normed2, moments=moments2, eps=eps)

        hidden = slab + self.hidden_at
        self.fc1(saved.normed2, factors.fc1, saved.gelu_input, hidden, workspace, factors.fc1_bias)
        self.convolve(x_data=hidden, weight=w.conv, bias=w.conv_bias, y=saved.convolved)
        branch = saved.branch2 if self.scale2 else narrow
        self.fc2(saved.convolved, factors.fc2, branch, workspace, factors.fc2_bias)
        if self.scale2:
            self.scale2(branch=branch, gamma=w.gamma2, scaled=scaled)
            branch = scaled
        self.add(x=saved.total, branch=branch, scale=scale2, sum=result, eps=0.0)


_forward_of = cached(_Forward)


def key_of(x: Tensor, weights: Weights, decay: Tensor, whole: bool, dtype: torch.dtype) -> tuple:
    """The sizes and dtypes that decide the launches."""
    tf32 = dtype == SINGLE and torch.backends.cuda.matmul.allow_tf32
    return (x.get_device(), sizes_of(x, weights, decay), whole, x.dtype, dtype, tf32,
            tuple([None if t is None else t.dtype for t in weights]))


def forward(x: Tensor, weights: Weights, decay: Tensor, turns: Tensor,
            scales: tuple[Tensor | None, Tensor | None], whole: bool, eps: float,
            dtype: torch.dtype, save: bool) -> tuple[Tensor, Tensor]:
    """The result, and the slab for the backward, empty unless ``save``."""
    launches = _forward_of(*key_of(x, weights, decay, whole, dtype), save=save)
    # The tensors are kept alive until all is launched.
    tensors, (x_at, *addresses) = aligned(x, decay, turns, *scales, *weights)
    result = x.new_empty(x.shape)
    slab = x.new_empty(launches.slab.size, dtype=torch.uint8)
    saved = x.new_empty(launches.saved_size if save else 0, dtype=torch.uint8)
    arguments = (eps, x_at, slab.data_ptr(), result.data_ptr(), saved.data_ptr(), *addresses)
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return result, saved
