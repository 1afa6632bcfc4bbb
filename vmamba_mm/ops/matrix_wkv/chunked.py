"""``wkv6`` and ``wkv7`` in plain PyTorch, parallel within chunks, forward and backward."""

import functools

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.matrix_wkv.chunks import (
    Decays,
    carry,
    scan,
    scan_backward,
    sum_after,
    sum_from,
    sum_until,
)


class _Pass6:
    """What forward and backward of ``wkv6`` calculate of a block.

    A token reads the state before its chunk, (r * before) S, and the earlier tokens of its chunk by
    scores, and itself by u.
    """

    def __init__(self, r, k, v, w, u, block, state):
        dtype = compute_dtype(r.dtype)
        self.r, self.k, self.v = (block.cut_heads(t[block.place], dtype) for t in (r, k, v))
        self.u = u.to(dtype)[:, None]
        self.decays = decays = Decays(block, w)
        self.reading, self.leaving = self.r * decays.before, self.k * decays.out
        self.order = block.time
        self.before, self.last = carry(self.order, state, decays.through, self.leaving.mT @ self.v)

    def _scores(self):
        (scores,), = self.decays.scores([self.r], [self.k])
        scores.diagonal(dim1=-2, dim2=-1).copy_((self.r * self.u * self.k).sum(-1))
        return scores

    def result(self) -> Tensor:
        return self.reading @ self.before + self._scores() @ self.v

    def backward(self, gy, grad_last):
        decays = self.decays
        after, grad_state = carry(self.order[::-1], grad_last, decays.through, self.reading.mT @ gy)
        by_scores = gy @ self.v.mT
        by_self = by_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        by_reading, by_leaving = gy @ self.before.mT, self.v @ after.mT
        (gr,), (gk,), by_logs = decays.scores_backward([[by_scores]], [self.r], [self.k])
        gr = gr + by_reading * decays.before + by_self * self.u * self.k
        gk = gk + by_leaving * decays.out + by_self * self.u * self.r
        gv = self._scores().mT @ gy + self.leaving @ after
        by_through = (self.before * after).sum(-1) * decays.through
        by_logs = (by_logs + sum_after(by_reading * self.reading)
                   + sum_until(by_leaving * self.leaving) + by_through[..., None, :])
        gu = (by_self * self.r * self.k).sum((0, 1, 3))
        return (gr, gk, gv, decays.to_w(by_logs)), gu, grad_state


class _Pass7:
    """What forward and backward of ``wkv7`` calculate of a block.

    Within a chunk that begins with S, what token t removes, ``removed_t = a_t S_(t-1)``, is

        removed_t = (a_t * before_t) S + sum_(s<t) A_ab[t, s] removed_s + A_ak[t, s] v_s

    with scores A of two tokens, a triangular system that has the inverse (1 - A_ab)^-1. What a
    chunk does to the state is then a matrix of low rank, ``written^T read``, beside the decay.
    """

    def __init__(self, r, w, k, v, a, b, block, state):
        dtype = compute_dtype(r.dtype)
        self.r, self.k, self.v, self.a, self.b = (
            block.cut_heads(t[block.place], dtype) for t in (r, k, v, a, b))
        self.decays = decays = Decays(block, w)
        # y is read after the update: the pairs of r have the decay of the token itself too.
        self.decayed_r = self.r * decays.own
        (A_ab, self.A_ak), (self.A_rb, self.A_rk) = decays.scores(
            [self.a, self.decayed_r], [self.b, self.k])
        for scores, key in ((self.A_rb, self.b), (self.A_rk, self.k)):
            scores.diagonal(dim1=-2, dim2=-1).copy_((self.r * key).sum(-1))
        eye = torch.eye(A_ab.shape[-1], dtype=dtype, device=r.device)
        self.inverse = torch.linalg.solve_triangular(
            eye - A_ab, eye.expand_as(A_ab), upper=False, unitriangular=True)
        self.asking, self.reading = self.a * decays.before, self.r * decays.into
        self.writing, self.leaving = self.b * decays.out, self.k * decays.out
        self.removing = self.inverse @ self.asking
        removed = self.inverse @ (self.A_ak @ self.v)
        self.order = block.time
        self.before, self.last = carry(
            self.order, state, decays.through, self.writing.mT @ removed + self.leaving.mT @ self.v,
            read=self.removing, written=self.writing)
        self.removed = removed + self.removing @ self.before

    def result(self) -> Tensor:
        return self.reading @ self.before + self.A_rb @ self.removed + self.A_rk @ self.v

    def backward(self, gy, grad_last):
        decays = self.decays
        by_removed = self.A_rb.mT @ gy
        after, grad_state = carry(
            self.order[::-1], grad_last, decays.through,
            self.reading.mT @ gy + self.removing.mT @ by_removed,
            read=self.writing, written=self.removing)
        by_removed = self.inverse.mT @ (by_removed + self.writing @ after)
        gv = self.A_rk.mT @ gy + self.leaving @ after + self.A_ak.mT @ by_removed
        by_scores = [[g @ self.removed.mT, g @ self.v.mT] for g in (by_removed, gy)]
        self_b, self_k = (g.diagonal(dim1=-2, dim2=-1)[..., None] for g in by_scores[1])
        (ga, by_decayed), (gb, gk), by_logs = decays.scores_backward(
            by_scores, [self.a, self.decayed_r], [self.b, self.k])
        by_asking, by_reading = by_removed @ self.before.mT, gy @ self.before.mT
        by_writing, by_leaving = self.removed @ after.mT, self.v @ after.mT
        gr = by_decayed * decays.own + by_reading * decays.into + self_b * self.b + self_k * self.k
        ga = ga + by_asking * decays.before
        gb = gb + by_writing * decays.out + self_b * self.r
        gk = gk + by_leaving * decays.out + self_k * self.r
        by_through = (self.before * after).sum(-1) * decays.through
        by_logs = (by_logs + by_decayed * self.decayed_r + sum_from(by_reading * self.reading)
                   + sum_after(by_asking * self.asking)
                   + sum_until(by_writing * self.writing + by_leaving * self.leaving)
                   + by_through[..., None, :])
        return (gr, decays.to_w(by_logs), gk, gv, ga, gb), 0, grad_state


def forward_wkv6(r, k, v, w, u, initial_state, return_final_state, chunk_len=None):
    """Shapes as in :func:`vmamba_mm.ops.wkv6`."""
    make = functools.partial(_Pass6, r, k, v, w, u)
    return scan(make, r, v, initial_state, return_final_state, chunk_len)


def backward_wkv6(grad_y, grad_state, r, k, v, w, u, initial_state, return_final_state,
                  chunk_len=None):
    """Gradients by r, k, v, w, u and initial_state (None where that is)."""
    make = functools.partial(_Pass6, r, k, v, w, u)
    grads, grad_u, grad_initial = scan_backward(
        make, r, v, (r, k, v, w), initial_state, grad_y, grad_state if return_final_state else None,
        chunk_len)
    return (*grads, grad_u.expand(u.shape).to(u.dtype).contiguous(), grad_initial)


def forward_wkv7(r, w, k, v, a, b, initial_state, return_final_state, chunk_len=None):
    """Shapes as in :func:`vmamba_mm.ops.wkv7`."""
    make = functools.partial(_Pass7, r, w, k, v, a, b)
    return scan(make, r, v, initial_state, return_final_state, chunk_len)


def backward_wkv7(grad_y, grad_state, r, w, k, v, a, b, initial_state, return_final_state,
                  chunk_len=None):
    """Gradients by r, w, k, v, a, b and initial_state (None where that is)."""
    make = functools.partial(_Pass7, r, w, k, v, a, b)
    grads, _, grad_initial = scan_backward(
        make, r, v, (r, w, k, v, a, b), initial_state, grad_y,
        grad_state if return_final_state else None, chunk_len)
    return (*grads, grad_initial)
