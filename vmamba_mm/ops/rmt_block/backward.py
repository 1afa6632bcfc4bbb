"""The backward of ``rmt_block``, as :mod:`vmamba_mm.ops.rmt_block.cuda` has the forward.

GELU alone is calculated again, by the launch that multiplies with its derivative.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.graphs import replay
from vmamba_mm.ops.core.launch import aligned, cached
from vmamba_mm.ops.fused import layer_scale
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import SumJob, sum_launch
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.mamba_blocks.cuda import scatter_launch
from vmamba_mm.ops.masa import cuda as masa
from vmamba_mm.ops.masa import lepe
from vmamba_mm.ops.rmt_block.cuda import SINGLE, Factors, Launches, Saved, key_of
from vmamba_mm.ops.rmt_block.weights import Weights

_OF_QKV = ('q', 'k', 'v', 'q_bias', 'k_bias', 'v_bias')
_JOBS = 6  # of a launch of sum_parts


class _Sums:
    """Partial sums in a slab, which the backward's kernels leave, and what adds them up to
    gradients by parameters at its end."""

    def __init__(self, launches: Launches):
        self._launches, self._jobs = launches, []

    def take(self, parts: int, rows: int, dim: int, weight: str | None, bias: str | None) -> int:
        """The offset of parts (rows + 1, D), of which the gradients have these names."""
        dtypes = [getattr(self._launches.dtypes, name, SINGLE) if name else None
                  for name in (weight, bias)]
        at = self._launches.slab.take(parts * (rows + 1) * dim)
        self._jobs.append((SumJob(parts, rows, dim, *dtypes), at, weight, bias))
        return at

    def bind(self):
        """It takes the slab's address, and a dict of addresses by the names of gradients."""
        groups = [self._jobs[i:i + _JOBS] for i in range(0, len(self._jobs), _JOBS)]
        groups = [(sum_launch(self._launches.index, *[job for job, *_ in group]), group)
                  for group in groups]

        def run(slab, grads):
            for launch, group in groups:
                launch(*[(slab + at, grads.get(weight, 0), grads.get(bias, 0))
                         for _, at, weight, bias in group])

        return run


class _Backward(Launches):
    def __init__(self, *key):
        super().__init__(*key)
        index, dtype, w, dim, hidden = self.index, self.dtype, self.dtypes, self.dim, self.hidden
        x_dtype, pixels = self.x_dtype, self.pixels
        self.bring, self.factors = self.gather(False)
        sums = _Sums(self)

        # The MLP.
        self.branch2 = self._branch('gamma2', 'fc2_bias', sums)
        self.fc2 = self.product(pixels, hidden, dim)
        self.dfc2 = self.product(dim, hidden, pixels, left_t=True, out_dtype=w.fc2)
        self.convolve = dwconv.forward_launch(index, dtype, w.conv, None, False, *self.hidden_map,
                                              dwconv.ADD)
        parts, self.gelu = mlp.column_launch(index, dtype, True, pixels, hidden)
        self.fc1_parts = sums.take(parts, 0, hidden, None, 'fc1_bias')
        parts, self.dconv = dwconv.backward_launch(index, dtype, w.conv, w.conv_bias,
                                                   *self.hidden_map, dwconv.ADD)
        self.conv_parts = sums.take(parts, 9, hidden, 'conv', 'conv_bias')
        self.fc1 = self.product(pixels, dim, hidden)
        self.dfc1 = self.product(hidden, dim, pixels, left_t=True, out_dtype=w.fc1)
        parts, self.norm2 = self._norm(dtype, w.norm2)
        self.norm2_parts = sums.take(parts, 1, dim, 'norm2', 'norm2_bias')

        # Attention.
        self.branch1 = self._branch('gamma1', 'out_bias', sums)
        self.out = self.product(pixels, dim, dim)
        self.dout = self.product(dim, dim, pixels, left_t=True, out_dtype=w.out)
        pixel = 3 * dim
        if self.whole:
            self.plane = self.attend('bwd', masa.WHOLE, pixel, dy_pixel=dim, keys_pixel=pixel,
                                     values_pixel=pixel, adds=0)
        else:
            self.columns = self.attend('bwd', masa.COLUMNS, dim, dy_pixel=dim, keys_pixel=pixel,
                                       values_pixel=dim, adds=0)
            self.rows = self.attend('bwd', masa.ROWS, pixel, dy_pixel=dim, keys_pixel=pixel,
                                    values_pixel=pixel, adds=1)
        self.lepe = lepe.launch(index, dtype, False, w.lepe, None, self.map[1], dim, pixel, pixel)
        parts, self.dlepe = lepe.backward_launch(index, dtype, self.map[1], pixel, dim)
        self.lepe_parts = sums.take(parts, 25, dim, 'lepe', 'lepe_bias')
        parts, self.sum_qkv = mlp.column_launch(index, dtype, False, pixels, pixel)
        self.qkv_parts = sums.take(parts, 0, pixel, None, 'qkv_bias')
        self.qkv = self.product(pixels, dim, pixel)
        self.dqkv = self.product(pixel, dim, pixels, left_t=True, out_dtype=SINGLE)
        parts, self.norm1 = self._norm(None, w.norm1)
        self.norm1_parts = sums.take(parts, 1, dim, 'norm1', 'norm1_bias')
        parts, self.dplace = dwconv.backward_launch(index, x_dtype, w.pos, w.pos_bias, *self.map,
                                                    dwconv.ADD)
        self.pos_parts = sums.take(parts, 9, dim, 'pos', 'pos_bias')
        self.place = dwconv.forward_launch(index, x_dtype, w.pos, None, False, *self.map,
                                           dwconv.ADD)
        self.sum = sums.bind()
        self._take_maps()

    def _norm(self, branch, weight):
        return norm.backward_launch(self.index, self.dtype, self.x_dtype, branch, weight,
                                    self.sizes.batch, self.sizes.length, self.dim)

    def _branch(self, gamma: str, bias: str, sums: _Sums):
        """What leaves the sums for the gradient by a branch's ``bias``, and with layer scale that
        by ``gamma``; it takes the gradient by the branch with layer scale, which becomes that by
        the branch itself, at ``to``."""
        type_ = getattr(self.dtypes, gamma)
        if type_ is None:
            parts, launch = mlp.column_launch(self.index, self.dtype, False, self.pixels, self.dim)
            at = sums.take(parts, 0, self.dim, None, bias)

            def run(slab, grad, to, branch, factors):
                launch(grad=grad, partials=slab + at)
                return grad
        else:
            parts, launch = layer_scale.backward_launch(self.index, self.dtype, type_, self.pixels,
                                                        self.dim)
            at = sums.take(parts, 1, self.dim, gamma, bias)

            def run(slab, grad, to, branch, factors):
                launch(branch=branch, gamma=factors, grad=grad, dbranch=to, partials=slab + at)
                return to
        return run

    def _take_maps(self):
        """Where the maps lie: those of the MLP in the place of those of attention."""
        dim, hidden, slab = self.dim, self.hidden, self.slab
        square, itemsize = dim * dim, 4
        self.dqkv_at = slab.take(3 * square)
        self.dqkv_bias_at = slab.take(3 * dim)
        offsets = [self.dqkv_at + i * square * itemsize for i in range(3)]
        offsets += [self.dqkv_bias_at + i * dim * itemsize for i in range(3)]
        self.scatter = scatter_launch(
            self.index, [square] * 3 + [dim] * 3,
            [getattr(self.dtypes, name) for name in _OF_QKV], offsets, [-1] * 6)
        self.workspace_at = slab.take(self.workspace_size, 1)
        self.dnormed_at, self.dtotal_at = self.take(dim), self.take(dim, self.x_dtype)
        self.dbranch_at, start = self.take(dim), slab.size
        self.dconvolved_at, self.dhidden_at, self.hidden_at = (self.take(hidden) for _ in range(3))
        end, slab.size = slab.size, start
        self.dmixed_at, self.dqkv_map_at, self.drows_at = (
            self.take(dim), self.take(3 * dim), self.take(dim))
        self.dplaced_at = self.take(dim, self.x_dtype)
        slab.size = max(slab.size, end)

    def launch(self, eps, grads, dy, dbranch2, dx, slab, saved, x, decay, turns, scale1,
               *addresses):
        """On addresses; ``grads`` are those of the gradients by the weights."""
        w = Weights._make(addresses)
        grads = dict(Weights._make(grads)._asdict(), qkv_bias=slab + self.dqkv_bias_at)
        saved = Saved(*[saved + at for at in self.saved])
        factors = Factors(*[slab + at for at in self.factors])
        workspace, dbranch, dnormed, dtotal = (slab + at for at in (
            self.workspace_at, self.dbranch_at, self.dnormed_at, self.dtotal_at))
        self.bring(w, slab)

        dbranch2 = self.branch2(slab, dbranch2, dbranch, saved.branch2, w.gamma2)
        dconvolved, dhidden, hidden = (slab + at for at in (
            self.dconvolved_at, self.dhidden_at, self.hidden_at))
        self.fc2(dbranch2, factors.fc2, dconvolved, workspace)
        self.dfc2(dbranch2, saved.convolved, grads['fc2'], workspace)
        self.convolve(x_data=dconvolved, weight=w.conv, y=dhidden)
        self.gelu(grad=dhidden, input=saved.gelu_input, result=hidden, dinput=dhidden,
                  partials=slab + self.fc1_parts)
        self.dconv(x_data=hidden, weight=w.conv, bias=w.conv_bias, dy=dconvolved,
                   partials=slab + self.conv_parts)
        self.fc1(dhidden, factors.fc1, dnormed, workspace)
        self.dfc1(dhidden, saved.normed2, grads['fc1'], workspace)
        self.norm2(grad=dnormed, input=saved.total, moments=saved.moments2, weight=w.norm2,
                   extra_grad=dy, scale=scale1, dinput=dtotal, dbranch=dbranch,
                   partials=slab + self.norm2_parts)

        dmixed, dqkv, dplaced = (slab + at for at in (
            self.dmixed_at, self.dqkv_map_at, self.dplaced_at))
        self.branch1(slab, dbranch, dbranch, saved.branch1, w.gamma1)
        self.out(dbranch, factors.out, dmixed, workspace)
        self.dout(dbranch, saved.mixed, grads['out'], workspace)
        v = saved.qkv + 2 * self.step
        dv = dqkv + 2 * self.step
        self._attend(saved, dmixed, dqkv, slab + self.drows_at, decay, turns)
        self.lepe(x_data=dmixed, more_data=dv, weight=w.lepe, y=dv)
        self.dlepe(x_data=v, dy_data=dmixed, partials=slab + self.lepe_parts)
        self.sum_qkv(grad=dqkv, partials=slab + self.qkv_parts)
        self.qkv(dqkv, factors.qkv, dnormed, workspace)
        self.dqkv(dqkv, saved.normed1, slab + self.dqkv_at, workspace)
        self.norm1(grad=dnormed, input=saved.placed, moments=saved.moments1, weight=w.norm1,
                   extra_grad=dtotal, dinput=dplaced, partials=slab + self.norm1_parts)
        self.dplace(x_data=x, weight=w.pos, bias=w.pos_bias, dy=dplaced,
                    partials=slab + self.pos_parts)
        self.place(x_data=dplaced, weight=w.pos, y=dx)
        self.sum(slab, grads)
        self.scatter([grads[name] for name in _OF_QKV], slab)

    def _attend(self, saved: Saved, dy: int, dqkv: int, drows: int, decay: int, turns: int):
        q, k, v = (saved.qkv + i * self.step for i in range(3))
        dq, dk, dv = (dqkv + i * self.step for i in range(3))
        same = dict(q_data=q, k_data=k, dq=dq, dk=dk, lines_decay=decay, lines_turns=turns)
        if self.whole:
            self.plane(v_data=v, dy_data=dy, dv=dv, **same)
        else:
            self.columns(v_data=saved.rows, dy_data=dy, dv=drows, **same)
            self.rows(v_data=v, dy_data=drows, dv=dv, **same)


_backward_of = cached(_Backward)


def backward(grad: Tensor, x: Tensor, weights: Weights, decay: Tensor, turns: Tensor,
             scales: tuple[Tensor | None, Tensor | None], saved: Tensor, whole: bool, eps: float,
             dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Gradients by x and the weights, None by one that is None."""
    launches = _backward_of(*key_of(x, weights, decay, whole, dtype))
    grad = grad.to(x.dtype)
    tensors, (dy, *addresses) = aligned(grad, saved, x, decay, turns, scales[0], *weights)
    dbranch2 = norm.scaled(tensors[0], scales[1], dtype)
    dx = x.new_empty(x.shape)
    grads = [None if t is None else t.new_empty(t.shape) for t in weights]
    slab = x.new_empty(launches.slab.size, dtype=torch.uint8)
    to = tuple([0 if t is None else t.data_ptr() for t in grads])
    arguments = (eps, to, dy, dbranch2.data_ptr(), dx.data_ptr(), slab.data_ptr(), *addresses)
    replay(launches.index, (launches, arguments), lambda: launches.launch(*arguments))
    return dx, *grads
