"""``spatial_mixer`` and ``channel_mixer`` by other ops: their specification, and what runs where no
kernel does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.gates import sigmoid_gate, squared_relu
from vmamba_mm.ops.shift_mix import shift_mix
from vmamba_mm.ops.wkv import bi_wkv


def spatial_mixer(x: Tensor, for_k: Tensor, for_v: Tensor, for_r: Tensor, key: Tensor,
                  value: Tensor, receptance: Tensor, output: Tensor, w: Tensor, u: Tensor,
                  official: bool, pixels: int, share: float, dtype: torch.dtype) -> Tensor:
    k, v, r = (F.linear(t, weight) for t, weight in zip(
        shift_mix(x, (for_k, for_v, for_r), pixels, share, out_dtype=dtype),
        (key, value, receptance), strict=True))
    tokens = v.shape[1] * v.shape[2]
    y = bi_wkv(w / tokens, u / tokens, k.flatten(1, 2), v.flatten(1, 2),
               mode='official' if official else 'paper').view(v.shape)
    return F.linear(sigmoid_gate(r, y), output)


def channel_mixer(x: Tensor, for_k: Tensor, for_r: Tensor, key: Tensor, value: Tensor,
                  receptance: Tensor, pixels: int, share: float, head_dim: int,
                  dtype: torch.dtype) -> Tensor:
    k, r = (F.linear(t, weight) for t, weight in zip(
        shift_mix(x, (for_k, for_r), pixels, share, head_dim=head_dim, out_dtype=dtype),
        (key, receptance), strict=True))
    return sigmoid_gate(r, F.linear(squared_relu(k), value))
