"""``shift_mix`` by the CUDA kernels ``shift_mix.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
    pointer,
)
from vmamba_mm.ops.fused.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import dense
from vmamba_mm.ops.shift_mix.reference import cuts_of

#: Mixtures of an op at most; MOST in shift_mix.cu.
MOST = 3


def why_not(x: Tensor, first: Tensor, second: Tensor, third: Tensor | None, pixels: int,
            share: float, head_dim: int, out_dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if any(cut % 4 for cut in (*cuts_of(head_dim, share), head_dim)):
        return 'the groups of channels do not begin at multiples of 4'
    if (TYPES.get(x.dtype), TYPES.get(out_dtype)) not in _PAIRS:
        return f'no mixtures of {out_dtype} are made from a map of {x.dtype}'
    if x.numel() // x.shape[-1] >= 2**31:
        return 'there are 2^31 positions or more'
    return why_not_channels(x, x.shape[-1], (first, second, third))


def instance(direction: str, type_: str, out_type: str) -> Instance:
    return Instance('fused/shift_mix.cu', f'shift_mix_{direction}<{type_}, {out_type}>')


#: Types of a map and of its mixtures.
_PAIRS = (('Half', 'Half'), ('BFloat', 'BFloat'), ('Float', 'Float'), ('Float', 'Half'),
          ('Float', 'BFloat'))
#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance(direction, *types): 80 if 'BFloat' in types else 75
    for direction in ('fwd', 'bwd') for types in _PAIRS}


@cached
def shift_launch(index: int, direction: str, dtype: torch.dtype, out_dtype: torch.dtype,
            shape: tuple[int, ...], pixels: int, share: float, head_dim: int,
            types: tuple[torch.dtype | None, ...]):
    """Blocks, each of which leaves a part (3, C) of the gradients by the shares, and the kernel; it
    takes addresses."""
    batch, height, width, dim = shape
    groups, positions = dim // 4, batch * height * width
    side = next((n for n in range(64, 15, -1) if groups % n == 0), min(groups, 32))
    above, columns = 256 // side, -(-groups // side)
    blocks = min(-(-positions // above), max(1, 16 * device_limits(index)[0] // columns))
    launch = kernel(index, instance, direction, TYPES[dtype], TYPES[out_dtype]).bind(
        (blocks, columns, 1), (side, above, 1), 4 * 4 * side * MOST, positions=positions,
        height=height, width=width, dim=dim, head=head_dim, pixels=pixels,
        ends=tuple(cuts_of(head_dim, share)[1:]), share_types=tuple(CODES.get(t, 0) for t in types))
    return blocks, launch


def _types(shares):
    return tuple(None if t is None else t.dtype for t in shares)


def forward(x, first, second, third, pixels, share, head_dim, out_dtype) -> tuple[Tensor, ...]:
    """The mixtures, the third one empty without its parameter."""
    x, shares = dense(x), [None if t is None else t.contiguous() for t in (first, second, third)]
    results = [None if t is None else torch.empty(x.shape, dtype=out_dtype, device=x.device)
               for t in shares]
    _, launch = shift_launch(x.get_device(), 'fwd', x.dtype, out_dtype, x.shape, pixels, share,
                             head_dim, _types(shares))
    launch(x=x.data_ptr(), shares=tuple(map(pointer, shares)), y=tuple(map(pointer, results)))
    return tuple(x.new_empty(0, dtype=out_dtype) if t is None else t for t in results)


def backward(grad_first, grad_second, grad_third, x, first, second, third, pixels, share, head_dim,
             out_dtype):
    """Gradients by x and the parameters (None by none)."""
    x, shares = dense(x), [None if t is None else t.contiguous() for t in (first, second, third)]
    grads = [None if grad is None or t is None else dense(grad)
             for grad, t in zip((grad_first, grad_second, grad_third), shares, strict=True)]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks, launch = shift_launch(x.get_device(), 'bwd', x.dtype, out_dtype, x.shape, pixels, share,
                                  head_dim, _types(shares))
    partials = x.new_empty((blocks, 1, MOST * x.shape[-1]), dtype=torch.float32)
    launch(x=x.data_ptr(), shares=tuple(map(pointer, shares)), y=tuple(map(pointer, grads)),
           dx=dx.data_ptr(), partials=partials.data_ptr())
    sums = torch.empty(partials.shape[2], dtype=torch.float32, device=x.device)
    parameter_grads(partials, None, sums, 0)
    return dx, *(None if t is None else part.to(t.dtype)
                 for t, part in zip(shares, sums.view(MOST, -1), strict=True))
