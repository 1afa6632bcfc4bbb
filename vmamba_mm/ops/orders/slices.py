"""The order of a volume's tokens across its slices (SegMamba, arXiv 2401.13560, section 2.2)."""

import torch
from torch import Tensor


def across_slices(x: Tensor, num_slices: int) -> Tensor:
    """Tokens slice by slice to the first token of every slice, then the second, and so on.

    Whole slices are a matrix of tokens, which is transposed: one strided copy, and no index.

    Args:
        x: (B, L, C).
        num_slices: of ceil(L / num_slices) tokens each. The last ones are shorter, or empty, where
            it does not come out.

    Returns:
        (B, L, C).

    Raises:
        ValueError: on another number of dimensions, or of slices below 1.

    Example:
        >>> across_slices(torch.arange(6).view(1, 6, 1), 2).flatten()
        tensor([0, 3, 1, 4, 2, 5])
    """
    _check('across_slices', x, num_slices)
    if x.shape[1] % num_slices:
        return x[:, _order(x, num_slices)]
    return x.unflatten(1, (num_slices, -1)).transpose(1, 2).flatten(1, 2)


def along_slices(x: Tensor, num_slices: int) -> Tensor:
    """The inverse of :func:`across_slices`, with the same arguments."""
    _check('along_slices', x, num_slices)
    if x.shape[1] % num_slices:
        return x[:, _order(x, num_slices).argsort()]
    return x.unflatten(1, (-1, num_slices)).transpose(1, 2).flatten(1, 2)


def _check(op: str, x: Tensor, num_slices: int) -> None:
    if x.dim() != 3 or num_slices < 1:
        raise ValueError(f'{op} expects x (B, L, C) and num_slices of at least 1, got x '
                         f'{tuple(x.shape)} and {num_slices}')


def _order(x: Tensor, num_slices: int) -> Tensor:
    """(L), sorted by the place in the slice, then by the slice; of a shape that compilers know."""
    length = x.shape[1]
    tokens, size = torch.arange(length, device=x.device), -(-length // num_slices)
    return (tokens % size * num_slices + tokens // size).argsort()
