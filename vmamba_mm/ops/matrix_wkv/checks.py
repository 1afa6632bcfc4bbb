"""The shapes that the ops with matrix-valued states take."""

from collections.abc import Mapping

from torch import Tensor


def check(name: str, letters: str, r: Tensor, v: Tensor, like_r: Mapping[str, Tensor],
          u: Tensor | None = None, **state: Tensor | None) -> None:
    """Raise ValueError unless the tensors of an op are real and their shapes fit one another.

    Args:
        name: of the op.
        letters: of the dimensions before the channels, 'BTH' for tokens or 'BH' for one.
        r: (..., N).
        v: (..., P).
        like_r: the tensors of r's shape by name.
        u: (H, N), where the op has it.
        state: (B, H, N, P) or None, by its name.
    """
    dims = ', '.join(letters)
    if r.dim() != len(letters) + 1 or v.dim() != r.dim() or 0 in r.shape[1:-2]:
        raise ValueError(f'{name} expects r ({dims}, N) and v ({dims}, P)'
                         + (', T of at least 1' if 'T' in letters else '')
                         + f'; got r {tuple(r.shape)}, v {tuple(v.shape)}')
    *first, size = r.shape
    batch, heads, dim = first[0], first[-1], v.shape[-1]
    expected = {key: (t, r.shape) for key, t in like_r.items()}
    expected |= dict(v=(v, (*first, dim)), u=(u, (heads, size)))
    expected |= {key: (t, (batch, heads, size, dim)) for key, t in state.items()}
    for key, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f'{name} expects {key} of shape {tuple(shape)} beside r '
                             f'{tuple(r.shape)}, got {tuple(tensor.shape)}')
        if not (tensor.is_floating_point() and r.is_floating_point()):
            raise ValueError(f'{name} expects real tensors, complex ones and integers are not '
                             f'supported; got r {r.dtype}, {key} {tensor.dtype}')
