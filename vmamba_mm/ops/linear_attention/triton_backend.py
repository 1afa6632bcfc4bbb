"""``linear_attention`` by the Triton kernels: the states of all parts of the tokens, and what they
give, in two launches, or three with rank augmentation; the backward in as many more.

Triton is imported by the first call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.scan_kernels import triton_backend

MOST_CHANNELS = 128
_PROGRAMS = 512  # that a launch should have

#: Parts of the tokens, for tests.
force_splits: int | None = None


def why_not(q: Tensor, k: Tensor, v: Tensor, turns: Tensor | None, *_) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if max(q.shape[3], v.shape[3]) > MOST_CHANNELS:
        return f'a head has {max(q.shape[3], v.shape[3])} channels, the kernels take up to ' \
               f'{MOST_CHANNELS}'
    if turns is not None and q.shape[3] % 2:
        return 'a pair of channels that turns would be in two heads'
    return triton_backend.why_not(v, v.dtype, by_default=False)


def _kind(dtype: torch.dtype):
    """Triton's name of what is multiplied; its interpreter cannot multiply bf16."""
    import triton.language as tl

    from vmamba_mm.ops.scan_kernels.triton_launch import interpreted
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)


class _Sizes(NamedTuple):
    length: int
    width: int
    depth: int
    heads: int


class _Call:
    """What the launches of a forward and a backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, turns: Tensor | None, augmented: bool,
                 eps: float):
        import triton

        from vmamba_mm.ops.scan_kernels.triton_launch import _precision
        batch, length, heads, width = q.shape
        self.q, self.k, self.v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        self.turns, self.augmented, self.eps = turns, augmented, eps
        self.sizes = _Sizes(length, width, v.shape[3], heads)
        widest = max(16, triton.next_power_of_2(max(width, v.shape[3])))
        tokens = 64 if widest <= 64 else 32  # of a step of a program, by what registers hold
        self.programs, self.blocks = batch * heads, -(-length // tokens)
        wanted = force_splits or -(-_PROGRAMS // max(self.programs, 1))
        self.part_length = -(-self.blocks // min(wanted, self.blocks)) * tokens
        self.splits = -(-length // self.part_length)
        self.blocked = dict(P=max(16, triton.next_power_of_2(width)), L=tokens, SPLITS=self.splits,
                            num_warps=4 if widest <= 32 else 8)
        self.options = dict(self.blocked, E=max(16, triton.next_power_of_2(v.shape[3])),
                            TURNED=turns is not None, AUGMENTED=augmented, KIND=_kind(v.dtype),
                            PRECISION=_precision())

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def find_states(self) -> tuple[Tensor, ...]:
        """The mean query, or None; the states, the sums of the keys, and the scales, or None."""
        from vmamba_mm.ops.linear_attention import triton_kernels as kernels
        length, width, depth, heads = self.sizes
        parts, grid = (self.programs, self.splits), (self.programs, self.splits)
        means = self.empty(*parts, width) if self.augmented else None
        scales = self.empty(*parts, 2) if self.augmented else None
        states, totals = self.empty(*parts, width, depth), self.empty(*parts, width)
        if self.augmented:
            kernels.sum_features[grid](
                self.q, means, length, width, heads, *self.q.stride()[:3], self.part_length,
                **self.blocked)
        kernels.find_states[grid](
            self.k, self.v, self.turns, means, states, totals, scales, *self.sizes, width ** -0.5,
            *self.k.stride()[:3], *self.v.stride()[:3], self.part_length, **self.options)
        return means, states, totals, scales


def forward(q, k, v, turns, augmented, eps) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.linear_attention`."""
    from vmamba_mm.ops.linear_attention import triton_kernels as kernels
    from vmamba_mm.ops.scan_kernels.triton_launch import on_device
    call = _Call(q, k, v, turns, augmented, eps)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not y.numel():
        return y
    with on_device(v):
        _, *found = call.find_states()
        kernels.attend[call.programs, call.blocks](
            call.q, turns, *found, y, *call.sizes, eps, *call.q.stride()[:3], *y.stride()[:3],
            **call.options)
    return y


def backward(grad, q, k, v, turns, augmented, eps):
    """Gradients by q, k and v."""
    from vmamba_mm.ops.linear_attention import triton_kernels as kernels
    from vmamba_mm.ops.scan_kernels.triton_launch import on_device
    call = _Call(q, k, v, turns, augmented, eps)
    grad = grad.to(v.dtype)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    width, depth, scale = call.sizes.width, call.sizes.depth, call.sizes.width ** -0.5
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not v.numel():
        return dq.zero_(), dk.zero_(), dv
    with on_device(v):
        means, *found = call.find_states()
        by_state = call.empty(call.programs, call.splits, width, depth)
        by_total = call.empty(call.programs, call.splits, width)
        by_means = call.empty(call.programs, call.blocks, width) if augmented else None
        of_queries = *call.q.stride()[:3], *grad.stride()[:3]
        kernels.find_grad_states[call.programs, call.splits](
            call.q, grad, turns, *found, by_state, by_total, *call.sizes, eps, *of_queries,
            call.part_length, **call.options)
        kernels.by_keys[call.programs, call.blocks](
            call.k, call.v, turns, means, *found, by_state, by_total, dk, dv, by_means,
            *call.sizes, scale, *call.k.stride()[:3], *call.v.stride()[:3], call.blocks,
            **call.options)
        kernels.by_queries[call.programs, call.blocks](
            call.q, grad, turns, *found, by_means, dq, *call.sizes, eps, *of_queries, call.blocks,
            **call.options)
    return dq, dk, dv
