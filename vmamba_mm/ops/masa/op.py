"""Manhattan self-attention on PyTorch's scaled_dot_product_attention."""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmamba_mm.ops.core.define_op import is_transformed

FORMS = ('decomposed', 'whole')


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
    rows, columns = (_distances(size, decay) for size in (height, width))
    if form == 'decomposed':
        return _times(decay, columns), _times(decay, rows)
    distances = rows[:, None, :, None] + columns[None, :, None, :]  # (H, W, H, W)
    return _times(decay, distances.reshape(height * width, height * width)),


def masa(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, form: str = 'decomposed', *,
         masks: Sequence[Tensor] | None = None) -> Tensor:
    """Manhattan self-attention, of which the scores fall with the distance (arXiv 2309.11523,
    sections 3.2 and 3.3).

    'whole': ``softmax(q k^T / sqrt(P) + decay * (|dh| + |dw|)) v`` over all pixels of a map.
    'decomposed': the same along each row, and then, with the same q and k and what came out in
    place of v, along each column; the cost is that of HW (H + W) products, and no mask is larger
    than a side's square for each head. The paper multiplies the softmax by the decay; the authors'
    code, on which the published weights rest, adds its logarithm before, as here.

    Args:
        q, k: (B, H, W, n, P), queries and keys of n heads, turned by their positions.
        v: (B, H, W, n, E).
        decay: (n), the logarithms of the heads' decay per pixel of distance: numbers below 0.
        form: 'decomposed' or 'whole'.
        masks: :func:`decay_masks` of ``decay`` for this size and form, if they are at hand.

    Returns:
        (B, H, W, n, E), in the dtype of ``v``, or autocast's.

    Raises:
        ValueError: on shapes that do not fit, or another ``form``.
    """
    _check_form(form)
    if q.dim() != 5 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError('q and k must be (B, H, W, n, P) and v (B, H, W, n, E), got '
                         f'{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}')
    if decay.shape != q.shape[3:4]:
        raise ValueError(f'decay must have one number for each of the {q.shape[3]} heads, got '
                         f'shape {tuple(decay.shape)}')
    height, width = q.shape[1:3]
    if masks is None:
        masks = decay_masks(decay, height, width, form)
    if form == 'whole':
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
