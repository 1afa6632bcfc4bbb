"""The parameters of a Mamba block, one after the other in a list."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """The parameters of one direction of a mixer.

    D inner channels, W taps, R rank of dt, N state.
    """
    conv: Tensor       # (D, 1, W)
    conv_bias: Tensor  # (D)
    x_proj: Tensor     # (R + 2N, D), its rows in the order dt, B, C
    dt_proj: Tensor    # (D, R)
    dt_bias: Tensor    # (D)
    A_log: Tensor      # (D, N)
    D: Tensor          # (D)


class Weights(NamedTuple):
    """The parameters of a block, in the order of the op's list; C channels of a token."""
    norm: Tensor              # (C)
    norm_bias: Tensor | None  # (C), of a LayerNorm; None for an RMSNorm
    in_proj: Tensor           # (2D, C)
    out_proj: Tensor          # (C, D)
    directions: tuple[Direction, ...]  # forward; then backward, if there are two


def flatten(weights: Weights) -> list:
    """The tensors of a block that are there, or what stands for each, one after the other."""
    norm = weights[:1] if weights.norm_bias is None else weights[:2]
    return [*norm, *after_norm(weights)]


def after_norm(weights: Weights) -> list:
    """The same without those of the norm."""
    return [weights.in_proj, weights.out_proj,
            *[t for direction in weights.directions for t in direction]]


def split(weights: Sequence, count: int) -> Iterator[Weights]:
    """The ``count`` blocks of a list that has those of each by :func:`flatten`, whose number says
    whether there is a bias of the norm, and how many directions."""
    size, of_direction = len(weights) // count, len(Direction._fields)
    of_norm = 2 if (size - 3) % of_direction == 1 else 1
    for first in range(0, len(weights), size):
        block = weights[first:first + size]
        in_proj, out_proj, *rest = block[of_norm:]
        yield Weights(block[0], block[1] if of_norm == 2 else None, in_proj, out_proj, tuple(
            [Direction(*rest[i:i + of_direction]) for i in range(0, len(rest), of_direction)]))
