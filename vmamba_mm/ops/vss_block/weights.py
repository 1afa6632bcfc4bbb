"""The parameters of a VSS block, and functions that have an argument for each of them."""

from typing import NamedTuple

from torch import Tensor

from vmamba_mm.ops.core.gathering import gather_into


class Weights(NamedTuple):
    """The parameters of a VSS block, in the order of the op's schema: layer, op and launches have
    them as this tuple. Launches also have the addresses, dtypes and gradients in this form.

    C channels, D inner ones, E of them or with a gate twice as many, F hidden ones of the MLP,
    K = 4 routes, N state, R rank of dt. Those of the MLP and its norm are None where there is none.
    """
    norm1: Tensor              # (C)
    norm1_bias: Tensor         # (C)
    in_proj: Tensor            # (E, C)
    conv: Tensor               # (D, 1, 3, 3)
    x_proj: Tensor             # (K, R + 2N, D)
    dt_projs: Tensor           # (K, D, R)
    dt_bias: Tensor            # (K, D)
    A_logs: Tensor             # (K * D, N)
    D: Tensor                  # (K * D)
    out_norm: Tensor           # (D)
    out_norm_bias: Tensor      # (D)
    out_proj: Tensor           # (C, D)
    norm2: Tensor | None       # (C)
    norm2_bias: Tensor | None  # (C)
    fc1: Tensor | None         # (F, C)
    fc1_bias: Tensor | None    # (F)
    fc2: Tensor | None         # (C, F)
    fc2_bias: Tensor | None    # (C)
    conv_bias: Tensor | None   # (D)


NUM_WEIGHTS = len(Weights._fields)
#: What a block without an MLP has not.
OF_MLP = 'norm2', 'norm2_bias', 'fc1', 'fc1_bias', 'fc2', 'fc2_bias'
gather_weights = gather_into(Weights)
