"""``masa`` by the CUDA kernels in ``kernels/masa``, on the tensor cores.

A launch takes all lines of the maps, rows or columns, or whole maps of up to 64 pixels. It turns
queries and keys as it reads them, and knows distances without a mask. The kernels need sm_80.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype, wants_grad
from vmamba_mm.ops.core.launch import (
    TYPES,
    Instance,
    cached,
    kernel,
    pointer,
    why_not_beside,
)
from vmamba_mm.ops.fused.channels import as_template
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels
from vmamba_mm.ops.scan_kernels.cuda import dense

LONGEST = 64  # pixels of a line
_DIMS = 16, 32  # P of the kernels
_WARPS = 4  # of a block, and of the longest line
ROWS, COLUMNS, WHOLE = range(3)  # kinds of lines


def why_not(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, turns: Tensor | None, whole: bool
            ) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        return 'queries, keys and values differ in shape or dtype'
    if wants_grad(decay, turns):
        return 'a gradient by the decay is wanted, and the kernels have none'
    return why_not_beside(q, k, v, decay, turns) or why_not_map(q, whole, q.dtype)


def why_not_map(x: Tensor, whole: bool, dtype: torch.dtype | None = None) -> str | None:
    """The same of maps like ``x`` (B, H, W, n, P) in ``dtype``, None for that of ``x`` or of
    autocast."""
    reason = scan_kernels.why_not(x, 0, 1)
    if reason is not None:
        return reason
    autocast = autocast_dtype(x)
    if dtype is not None and autocast is not None and dtype != autocast:
        return 'autocast rounds its input first'
    height, width, heads, dim = x.shape[1:]
    if dim not in _DIMS:
        return f'P is {dim}; the kernels take {" and ".join(map(str, _DIMS))}'
    if max(height, width) > LONGEST or whole and height * width > LONGEST:
        return f'a line has more than {LONGEST} pixels'
    if x.shape[0] * max(height, width) * heads >= 2**31:
        return 'there are 2^31 lines or more'
    return _why_not_here(x.device.index)


@torch.compiler.assume_constant_result
def _why_not_here(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= (8, 0) else (
        f'a GPU of compute capability {capability} is too old for them')


# --- what is compiled -------------------------------------------------------------------------

def instance(direction: str, type_: str, dim: int, tiles: int, plane: bool) -> Instance:
    return Instance(f'masa/masa_{direction}.cu',
                    f'masa_{direction}<{type_}, {dim}, {tiles}, {as_template(plane)}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance(direction, type_, dim, tiles, plane): 80
    for direction in ('fwd', 'bwd') for type_ in ('Half', 'BFloat', 'Float') for dim in _DIMS
    for tiles, plane in ((1, False), (2, False), (4, False), (4, True))
    if tiles == _WARPS or type_ != 'Float'}


# --- launches ---------------------------------------------------------------------------------

@cached
def launch(index: int, direction: str, dtype: torch.dtype, shape: tuple[int, ...], kind: int,
           **constants: int) -> Callable[..., None]:
    """The kernel for lines of one kind of maps of ``shape`` (B, H, W, n, P); it takes addresses."""
    batch, height, width, heads, dim = shape
    count, length, step, next_ = {
        ROWS: (height, width, 1, width), COLUMNS: (width, height, width, 1),
        WHOLE: (1, height * width, 1, 0)}[kind]
    plane = kind == WHOLE
    tiles = _WARPS if plane or length > 32 or dtype == torch.float32 else -(-length // 16)
    together = min(heads, _WARPS // tiles)
    groups = -(-heads // together)
    rows, maps = 16 * tiles, 3 if direction == 'fwd' else 4
    shared = together * maps * rows * (dim * dtype.itemsize + 16)
    if direction == 'bwd':
        shared += together * 2 * rows * 4
    return kernel(index, instance, direction, TYPES[dtype], dim, tiles, plane).bind(
        (batch * count * groups, 1, 1), (32 * tiles * together, 1, 1), shared, lines_heads=heads,
        lines_length=length, lines_image=height * width, lines_count=count, lines_next=next_,
        lines_step=step, lines_width=width, lines_groups=groups, **constants)


# --- on tensors -------------------------------------------------------------------------------

def _as_pixels(x: Tensor) -> Tensor:
    """``x`` (B, H, W, n, P), or a copy if its pixels are not evenly spaced and without gaps."""
    _, height, width, _, dim = x.shape
    pixel = x.stride(2)
    even = x.stride()[3:] == (dim, 1) and x.stride()[:2] == (height * width * pixel, width * pixel)
    aligned = pixel * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x if even and aligned else x.clone(memory_format=torch.contiguous_format)


def _attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, turns: Tensor | None, kind: int
            ) -> Tensor:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(q.get_device(), 'fwd', q.dtype, q.shape, kind, q_pixel=q.stride(2),
            k_pixel=k.stride(2), v_pixel=v.stride(2))(
        q_data=q.data_ptr(), k_data=k.data_ptr(), v_data=v.data_ptr(), y=y.data_ptr(),
        lines_decay=decay.data_ptr(), lines_turns=pointer(turns))
    return y


def _attend_backward(q, k, v, dy, decay, turns, kind, grads, adds=False) -> None:
    """Write the gradients by q, k and v to ``grads``, or add the first two there."""
    dq, dk, dv = grads
    launch(q.get_device(), 'bwd', q.dtype, q.shape, kind, q_pixel=q.stride(2),
            k_pixel=k.stride(2), v_pixel=v.stride(2), dy_pixel=dy.stride(2),
            keys_pixel=dq.stride(2), values_pixel=dv.stride(2), adds=int(adds))(
        q_data=q.data_ptr(), k_data=k.data_ptr(), v_data=v.data_ptr(), dy_data=dy.data_ptr(),
        dq=dq.data_ptr(), dk=dk.data_ptr(), dv=dv.data_ptr(), lines_decay=decay.data_ptr(),
        lines_turns=pointer(turns))


def _prepared(q, k, v, decay, turns):
    q, k, v = (_as_pixels(t) for t in (q, k, v))
    return q, k, v, decay.float().contiguous(), None if turns is None else dense(turns.float())


def forward(q, k, v, decay, turns, whole, save) -> tuple[Tensor, Tensor]:
    """The result, and for the backward what comes of the rows; empty if there is no such thing."""
    q, k, v, decay, turns = _prepared(q, k, v, decay, turns)
    if whole:
        return _attend(q, k, v, decay, turns, WHOLE), v.new_empty(0)
    rows = _attend(q, k, v, decay, turns, ROWS)
    y = _attend(q, k, rows, decay, turns, COLUMNS)
    return y, rows if save else v.new_empty(0)


def backward(grad, q, k, v, decay, turns, rows, whole, grads=None):
    """Gradients by q, k and v; written to ``grads``, whose pixels are evenly spaced and begin at
    multiples of 16 bytes, those of the first two alike, or to new maps."""
    q, k, v, decay, turns = _prepared(q, k, v, decay, turns)
    grad = _as_pixels(grad)
    if grads is None:
        grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if whole:
        _attend_backward(q, k, v, grad, decay, turns, WHOLE, grads)
        return grads
    drows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    _attend_backward(q, k, rows, grad, decay, turns, COLUMNS, (*grads[:2], drows))
    _attend_backward(q, k, v, drows, decay, turns, ROWS, grads, adds=True)
    return grads
