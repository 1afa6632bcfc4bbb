"""The op ``masa``, Manhattan self-attention: its definition, checks, and the public functions; and
what runs where no kernel takes the inputs, on PyTorch's scaled_dot_product_attention."""

import contextlib
import functools
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmamba_mm.ops.core.calls import is_transformed
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.masa import cuda, reference
from vmamba_mm.ops.rotation import rotate_pairs

FORMS = ('decomposed', 'whole')


def _by_pixels(q, k, v, decay, turns, whole):
    q, k = _turned(q, k, turns)
    return reference.masa(q, k, v, decay, FORMS[whole])


def _count_flops(q, v, whole, **_) -> int:
    """Those of the products of queries and keys, and of weights and values."""
    height, width = q[1:3]
    seen = height * width if whole else height + width
    return 2 * seen * (prod(q) + prod(v))


_masa = define_op(
    'masa',
    '(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? turns, bool whole, bool save) -> '
    '(Tensor y, Tensor rows)',
    reference=_by_pixels,
    fake=lambda q, k, v, decay, turns, whole, save: (
        v.new_empty(v.shape), v.new_empty(v.shape if save and not whole else (0,))),
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not,
                                            saves=True)},
    saves='q k v decay turns rows whole',
    no_grad='decay turns',
    flops=_count_flops)


def needs_masks(x: Tensor, num_heads: int, form: str) -> bool:
    """Whether :func:`masa` of maps with the sizes of ``x`` (B, H, W, C) adds masks to scores, so
    that who calls it often should have made them before."""
    _check_form(form)
    heads = x.unflatten(-1, (num_heads, -1))
    return cuda.why_not_map(heads, form == 'whole') is not None


def decay_masks(decay: Tensor, height: int, width: int, form: str = 'decomposed'
                ) -> tuple[Tensor, ...]:
    """What :func:`masa` adds to the scores of a map: decay times distance.

    All calls on maps of one size may share them, as the blocks of a stage do.

    Args:
        decay: (n), the logarithms of the heads' decay per pixel of distance.
        height, width: H and W of the map.
        form: as of :func:`masa`.

    Returns:
        'decomposed': of rows, (n, W, W), and of columns, (n, H, H). 'whole': (n, HW, HW).
    """
    _check_form(form)
    if decay.dim() != 1:
        raise ValueError(f'decay must be (n), a number for each head, got {tuple(decay.shape)}')
    rows, columns = (_distances(size, decay) for size in (height, width))
    if form == 'decomposed':
        return _times(decay, columns), _times(decay, rows)
    distances = rows[:, None, :, None] + columns[None, :, None, :]  # (H, W, H, W)
    return _times(decay, distances.reshape(height * width, height * width)),


def masa(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, form: str = 'decomposed', *,
         masks: Sequence[Tensor] | None = None, turns: Tensor | None = None) -> Tensor:
    """Manhattan self-attention, of which the scores fall with the distance (arXiv 2309.11523,
    sections 3.2 and 3.3).

    'whole': ``softmax(q k^T / sqrt(P) + decay * (|dh| + |dw|)) v`` over all pixels of a map.
    'decomposed': the same along each row, and then, with the same q and k and what came out in
    place of v, along each column; the cost is that of HW (H + W) products, and no mask is larger
    than a side's square for each head. The paper multiplies the softmax by the decay; the authors'
    code, on which the published weights rest, adds its logarithm before, as here.

    On an NVIDIA GPU two kernels, or one, where P is 16 or 32 and no line (the rows and the columns,
    or the whole map) has more than 64 pixels; else PyTorch's ``scaled_dot_product_attention``.

    Args:
        q, k: (B, H, W, n, P), queries and keys of n heads, turned by their positions unless
            ``turns`` is given.
        v: (B, H, W, n, E).
        decay: (n), the logarithms of the heads' decay per pixel of distance: numbers below 0.
        form: 'decomposed' or 'whole'.
        masks: :func:`decay_masks` of ``decay`` for this size and form, if they are at hand;
            kernels have no use for them.
        turns: (H, W, P / 2, 2), fp32, cosines and sines by which pairs of neighbouring channels of
            q and k are turned first, as of RetNet; None if they are turned.

    Returns:
        (B, H, W, n, E), in the dtype of ``v``, or autocast's.

    Raises:
        ValueError: on shapes that do not fit, or another ``form``.

    Example, where all scores are equal but for the distance, the decay a half for each pixel:
        >>> q, v = torch.zeros(1, 1, 2, 1, 2), torch.tensor([0., 3.]).view(1, 1, 2, 1, 1)
        >>> masa(q, q, v, torch.tensor([0.5]).log()).flatten()
        tensor([1., 2.])
    """
    if q.dim() != 5 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError('q and k must be (B, H, W, n, P) and v (B, H, W, n, E), got '
                         f'{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}')
    if decay.shape != q.shape[3:4]:
        raise ValueError(f'decay must have one number for each of the {q.shape[3]} heads, got '
                         f'shape {tuple(decay.shape)}')
    check_places(q.shape, turns, form, masks)
    return _masa(q, k, v, decay, turns, form == 'whole',
                 otherwise=functools.partial(_by_products, masks=masks))


def check_places(shape: Sequence[int], turns: Tensor | None, form: str,
                 masks: Sequence[Tensor] | None) -> None:
    """Raise ValueError unless these fit heads of ``shape`` (B, H, W, n, P)."""
    _check_form(form)
    _, height, width, heads, dim = shape
    if turns is not None and turns.shape != (height, width, dim // 2, 2):
        raise ValueError(f'turns must be (H, W, P / 2, 2) for heads (B, H, W, n, P) of '
                         f'{tuple(shape)}, got {tuple(turns.shape)}')
    if masks is not None:
        sizes = (height * width,) if form == 'whole' else (width, height)
        found, expected = [tuple(mask.shape) for mask in masks], [(heads, n, n) for n in sizes]
        if found != expected:
            raise ValueError(f'masks must be the decay_masks of form={form!r} for this size, of '
                             f'shapes {expected}, got {found}')


def _turned(q: Tensor, k: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor]:
    if turns is None:
        return q, k
    table = turns.unsqueeze(2)  # the same for all heads
    return rotate_pairs(q, table), rotate_pairs(k, table)


def _by_products(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, turns: Tensor | None, whole: bool,
                 masks: Sequence[Tensor] | None = None) -> Tensor:
    height, width = q.shape[1:3]
    q, k = _turned(q, k, turns)
    if masks is None:
        masks = decay_masks(decay, height, width, FORMS[whole])
    if whole:
        flat = (t.flatten(1, 2) for t in (q, k, v))
        return _attend(*flat, masks[0]).unflatten(1, (height, width))
    v = _attend_rows(q, k, v, masks[0])
    return _attend_rows(*(t.transpose(1, 2) for t in (q, k, v)), masks[1]).transpose(1, 2)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows = (t.flatten(0, 1) for t in (q, k, v))  # of all maps, as a batch
    return _attend(*rows, mask).unflatten(0, q.shape[:2])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of (B, L, n, P), (B, L, n, P) and (B, L, n, E): (B, L, n, E)."""
    # Under vmap PyTorch's memory-efficient attention on GPUs takes no mask that is not mapped too.
    plain = q.is_cuda and is_transformed()
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask[None].to(q.dtype))
    return y.transpose(1, 2)


def _distances(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device)
    return (places[:, None] - places).abs()


def _times(decay: Tensor, distances: Tensor) -> Tensor:
    return decay[:, None, None] * distances


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f'form={form!r} does not exist; choose one of {FORMS}')
