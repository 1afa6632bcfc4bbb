"""The parameters of a VSS block, and functions that have an argument for each of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The parameters of a VSS block, in the order of the op's schema: layer, op and launches have
    them as this tuple. Launches also have the addresses, dtypes and gradients in this form.

    C channels, D inner ones, F hidden ones of the MLP, K = 4 routes, R rank of dt.
    """
    norm1: Tensor          # (C)
    norm1_bias: Tensor     # (C)
    in_proj: Tensor        # (D, C)
    conv: Tensor           # (D, 1, 3, 3)
    x_proj: Tensor         # (K, R + 2, D)
    dt_projs: Tensor       # (K, D, R)
    dt_bias: Tensor        # (K, D)
    A_logs: Tensor         # (K * D, 1)
    D: Tensor              # (K * D)
    out_norm: Tensor       # (D)
    out_norm_bias: Tensor  # (D)
    out_proj: Tensor       # (C, D)
    norm2: Tensor          # (C)
    norm2_bias: Tensor     # (C)
    fc1: Tensor            # (F, C)
    fc1_bias: Tensor       # (F)
    fc2: Tensor            # (C, F)
    fc2_bias: Tensor       # (C)
    conv_bias: Tensor | None  # (D)


NUM_WEIGHTS = len(Weights._fields)


def gather_weights(function: Callable) -> Callable:
    """Decorator: calls ``function(x, weights, ...)`` with the fields of ``weights`` given as
    arguments of their own."""
    @functools.wraps(function)
    def gathered(x, *args):
        return function(x, Weights._make(args[:NUM_WEIGHTS]), *args[NUM_WEIGHTS:])

    return gathered
