"""An RMT block in plain PyTorch, from the references of the ops that it is made of: the
specification (figure 3, arXiv 2309.11523)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.add_norm.reference import add_norm
from vmamba_mm.ops.masa.reference import masa
from vmamba_mm.ops.rmt_block.weights import Weights
from vmamba_mm.ops.rotation import rotate_pairs


def rmt_block(x: Tensor, w: Weights, decay: Tensor, turns: Tensor, scale1: Tensor | None,
              scale2: Tensor | None, whole: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), as :func:`vmamba_mm.ops.rmt_block.rmt_block`; ``dtype`` is that
    of matrix products and what they take."""
    def cast(*tensors):
        return [t.to(dtype) for t in tensors]

    x = x + _convolve(x, w.pos.to(x.dtype), w.pos_bias.to(x.dtype))
    _, normed = add_norm(x, None, None, w.norm1, w.norm1_bias, eps, dtype)
    q, k, v = (F.linear(normed, *cast(weight, bias)).to(dtype) for weight, bias in (
        (w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)))
    beside = _convolve(v, *cast(w.lepe, w.lepe_bias))
    q, k, v = (t.unflatten(-1, (len(decay), -1)) for t in (q, k, v))
    q, k = (rotate_pairs(t, turns.unsqueeze(2)) for t in (q, k))  # the same for all heads
    y = masa(q, k, v, decay, 'whole' if whole else 'decomposed').flatten(3).to(dtype)
    branch = F.linear(y + beside, *cast(w.out, w.out_bias))
    x, normed = add_norm(x, _scaled(branch, w.gamma1), scale1, w.norm2, w.norm2_bias, eps, dtype)
    hidden = F.gelu(F.linear(normed, *cast(w.fc1, w.fc1_bias)))
    hidden = hidden + _convolve(hidden, *cast(w.conv, w.conv_bias))
    branch = F.linear(hidden, *cast(w.fc2, w.fc2_bias))
    return add_norm(x, _scaled(branch, w.gamma2), scale2, None, None, eps, x.dtype)[0]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution of (B, H, W, C), padded with zeros."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2,
                 groups=len(weight))
    return y.permute(0, 2, 3, 1)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma.flatten()
