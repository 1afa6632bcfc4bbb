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
    norm: Tensor      # (C), of an RMSNorm
    in_proj: Tensor   # (2D, C)
    out_proj: Tensor  # (C, D)
    directions: tuple[Direction, ...]  # forward; then backward, if there are two


def flatten(weights: Weights) -> list:
    """The tensors of a block, or what stands for each, one after the other."""
    return [*weights[:3], *[t for direction in weights.directions for t in direction]]


def split(weights: Sequence, routes: int) -> Iterator[Weights]:
    """The blocks of a list that has those of each by :func:`flatten`."""
    size = len(Direction._fields)
    for first in range(0, len(weights), 3 + routes * size):
        start, end = first + 3, first + 3 + routes * size
        directions = [Direction(*weights[i:i + size]) for i in range(start, end, size)]
        yield Weights(*weights[first:start], tuple(directions))
