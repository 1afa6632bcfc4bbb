"""The parameters of an RMT block, and what takes them as one argument."""

from typing import NamedTuple

from torch import Tensor

from vmamba_mm.ops.core.gathering import gather_into


class Weights(NamedTuple):
    """The parameters of an RMT block, in the order of the op's schema: layer, op and launches have
    them as this tuple. Launches also have the addresses, dtypes and gradients in this form.

    C channels, F hidden ones of the MLP.
    """
    pos: Tensor         # (C, 1, 3, 3), the convolution before attention
    pos_bias: Tensor    # (C)
    norm1: Tensor       # (C)
    norm1_bias: Tensor  # (C)
    q: Tensor           # (C, C)
    q_bias: Tensor      # (C)
    k: Tensor           # (C, C)
    k_bias: Tensor      # (C)
    v: Tensor           # (C, C)
    v_bias: Tensor      # (C)
    lepe: Tensor        # (C, 1, 5, 5), the convolution beside attention
    lepe_bias: Tensor   # (C)
    out: Tensor         # (C, C)
    out_bias: Tensor    # (C)
    norm2: Tensor       # (C)
    norm2_bias: Tensor  # (C)
    fc1: Tensor         # (F, C)
    fc1_bias: Tensor    # (F)
    conv: Tensor        # (F, 1, 3, 3), the convolution within the MLP
    conv_bias: Tensor   # (F)
    fc2: Tensor         # (C, F)
    fc2_bias: Tensor    # (C)
    gamma1: Tensor | None  # (..., C): factors of the channels of attention's branch, or None for 1
    gamma2: Tensor | None  # the same of the MLP's


NUM_WEIGHTS = len(Weights._fields)
gather_weights = gather_into(Weights)
