"""Softmax attention, for models that have it beside their scans."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Softmax attention of all tokens to all (arXiv 1706.03762, section 3.2.2).

    Args:
        dim: C, channels of a token.
        num_heads: heads of C / num_heads channels each.
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'num_heads={num_heads} must divide the {dim} channels')
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, L, C / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))
