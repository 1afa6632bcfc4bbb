"""The maps of a block by name, and where they lie: one or two slabs of memory, where one takes
another's place as soon as nobody reads that any more.

Launches have these tuples of addresses; what is worked out before are sizes, and offsets in the
slab, in the same order.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch

_ALIGNED = 128  # elements: where parts of a slab begin


class Saved(NamedTuple):
    """Maps that the backward needs beside the inputs. A forward without one has those that it
    needs itself in its slab; the last four, which it does not write then, are 0. Without an MLP
    there is no sum after the first branch and nothing that follows it."""
    normed1: int         # the first norm's result
    in_projected: int    # the result of in_proj: what the convolution takes, and the gate
    scan_input: int      # that of the convolution and SiLU
    projected: int       # that of x_proj: dt, B and C of all routes
    scan_state: int      # the parameters as the scan takes them, and its states
    total: int           # the sum after the first branch, in the dtype of x
    normed2: int
    gelu_input: int
    merged: int = 0      # the sum of the scan's maps
    moments1: int = 0    # mean and 1 / deviation of each pixel before a norm, fp32
    moments2: int = 0
    merged_moments: int = 0


class ForwardSlab(NamedTuple):
    """Maps and memory that a forward writes for itself."""
    rounded: int      # parameters of matrix products, in their dtype
    workspace: int    # of the products
    scan_memory: int
    scan_maps: int    # a map for each route, or for two
    out_normed: int   # out_norm's result
    branch1: int      # the result of SS2D
    hidden: int       # of the MLP
    branch2: int      # the result of the MLP


class BackwardSlab(NamedTuple):
    """Maps and memory that a backward writes beside the gradients: ``d...`` are gradients by maps
    of the forward, ``..._parts`` partial sums in fp32 of the gradients by parameters."""
    rounded: int
    workspace: int
    scan_memory: int
    dhidden: int         # then by GELU's input, in place
    hidden: int          # calculated again
    dnormed2: int
    dtotal: int          # in the dtype of x
    dbranch1: int
    out_normed: int      # calculated again
    dout_normed: int
    dmerged: int
    scan_maps: int       # by scan_input, but for what comes through x_proj
    dprojected: int      # by projected, one for each block of channels
    dprojected_sum: int  # their sum, if they are several
    dx_proj: int         # by x_proj_weight, as the matrix product gives it
    dscan_input: int
    dconv: int           # by the result of the convolution, before SiLU
    din_projected: int   # by what the convolution took, and by the gate
    dnormed1: int
    fc1_parts: int
    fc2_parts: int
    norm2_parts: int
    out_norm_parts: int
    scan_parts: int
    conv_parts: int
    norm1_parts: int


def lay_out(*sizes: int) -> tuple[list[int], int]:
    """The offsets of parts of these sizes in a slab, and the size of that; all in elements."""
    *starts, end = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
    return starts, end


def in_bytes(dtype: torch.dtype, offsets: Iterable[int]) -> list[int]:
    """Offsets in elements of ``dtype`` as bytes."""
    return [dtype.itemsize * n for n in offsets]
