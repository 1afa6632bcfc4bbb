"""Softmax attention, for models that have it beside their scans."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.mamba import convolve


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


class AttentionState(NamedTuple):
    """What causal attention keeps of the tokens that it has seen: unlike the states of the scans,
    it grows with them."""

    conv: Tensor  #: (B, d_conv - 1, channels), the last inputs of the convolution, oldest first
    keys: Tensor  #: (B, heads, T, P)
    values: Tensor  #: (B, heads, T, P)
    seen: Tensor  #: (B), how many tokens each text has: its keys are the last so many of the T

    @classmethod
    def joined(cls, parts: Sequence['AttentionState']) -> 'AttentionState':
        """The states of several batches as one, in order, whatever the lengths of their texts."""
        length = max(part.keys.shape[2] for part in parts)

        def join(name):
            padded = [F.pad(getattr(part, name), (0, 0, length - part.keys.shape[2], 0))
                      for part in parts]
            return torch.cat(padded)

        return cls(torch.cat([part.conv for part in parts]), join('keys'), join('values'),
                   torch.cat([part.seen for part in parts]))


class CausalAttention(nn.Module):
    """Softmax attention of each token to itself and those before (arXiv 1706.03762, section 3.2),
    as the ``MHA`` of ``mamba_ssm``, of which parameters have the names.

    Args:
        embed_dims: C, channels of a token.
        num_heads: heads of queries.
        head_dim: P, channels of a head; None for C / num_heads.
        num_kv_heads: heads of keys and values, of which each serves as many heads of queries; None
            for ``num_heads``.
        d_conv: W, width of a causal depthwise convolution of queries, keys and values; 0 for none.
        rotary_dims: the first so many channels of a head turn with the position (RoPE, arXiv
            2104.09864, in halves as of GPT-NeoX).
        qkv_bias, out_bias: whether ``in_proj`` and ``out_proj`` have a bias.
        drop_rate: of the weights of attention, in training.
        split_proj: queries, keys and values have projections of their own, ``q_proj``, ``k_proj``
            and ``v_proj``, in place of ``in_proj``, as files of transformers have them.

    Shape: (B, L, C) -> (B, L, C), with a state that and the :class:`AttentionState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, num_heads: int = 1, head_dim: int | None = None,
                 num_kv_heads: int | None = None, *, d_conv: int = 0, rotary_dims: int = 0,
                 qkv_bias: bool = True, out_bias: bool = True, drop_rate: float = 0.0,
                 split_proj: bool = False):
        super().__init__()
        if num_heads < 1 or head_dim is None and embed_dims % num_heads:
            raise ValueError(f'num_heads={num_heads!r} must divide the {embed_dims} channels, '
                             'unless head_dim is given')
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f'num_kv_heads={num_kv_heads!r} must divide num_heads={num_heads}')
        head_dim = embed_dims // num_heads if head_dim is None else head_dim
        if head_dim < 1 or not 0 <= rotary_dims <= head_dim or rotary_dims % 2:
            raise ValueError(f'rotary_dims must be even and at most head_dim={head_dim}, which '
                             f'must be at least 1, got {rotary_dims!r}')
        if d_conv < 0 or d_conv == 1:
            raise ValueError(f'd_conv must be 0 or at least 2, got {d_conv!r}')
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.d_conv, self.rotary_dims, self.drop_rate = d_conv, rotary_dims, drop_rate
        parts = dict(q=num_heads, k=kv_heads, v=kv_heads)
        channels = head_dim * sum(parts.values())
        self.in_proj = None if split_proj else nn.Linear(embed_dims, channels, bias=qkv_bias)
        for name, heads in parts.items():
            self.add_module(f'{name}_proj', nn.Linear(
                embed_dims, head_dim * heads, bias=qkv_bias) if split_proj else None)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, padding=d_conv - 1,
                                groups=channels) if d_conv else None
        self.out_proj = nn.Linear(head_dim * num_heads, embed_dims, bias=out_bias)

    def forward(self, x: Tensor, state: AttentionState | None = None
                ) -> Tensor | tuple[Tensor, AttentionState]:
        """The mixer's result, and the new state if one is given, which is not changed.

        Args:
            x: (B, L, C).
            state: of the tokens before ``x``; None if there are none and nothing comes after.
        """
        qkv = self.in_proj(x) if self.in_proj is not None else torch.cat(
            [self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        tail = None if state is None else state.conv.to(qkv.dtype)
        seen = qkv if tail is None else torch.cat([tail, qkv], dim=1)
        if self.conv1d is not None:
            qkv = convolve(self.conv1d, qkv, tail, silu=False)
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.rotary_dims:
            q, k = (self._rotated(t, None if state is None else state.seen) for t in (q, k))
        mask = None
        if state is not None:
            # Of the first tokens no mask is made, whose size would be the square of the length.
            if state.keys.shape[2]:
                mask = _mask(state, x.shape[1])
            k = torch.cat([state.keys.to(k.dtype), k], dim=2)
            v = torch.cat([state.values.to(v.dtype), v], dim=2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.drop_rate if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if state is None:
            return y
        return y, AttentionState(seen[:, x.shape[1]:].clone(), k, v, state.seen + x.shape[1])

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One more token: (B, C) and the state of the tokens before, which is not changed."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def init_state(self, batch: int) -> AttentionState:
        """The state before the first token, of ``batch`` sequences."""
        weight = self.out_proj.weight
        keys = weight.new_zeros(batch, self.num_kv_heads, 0, self.head_dim)
        channels = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return AttentionState(
            weight.new_zeros(batch, max(self.d_conv - 1, 0), channels), keys, keys,
            torch.zeros(batch, dtype=torch.long, device=weight.device))

    def _rotated(self, x, seen):
        """(B, heads, L, P), whose first token has the position ``seen`` (B), or 0."""
        dims = self.rotary_dims
        steps = torch.arange(x.shape[2], device=x.device)
        positions = steps if seen is None else (seen[:, None] + steps)[:, None]
        rates = 10000.0 ** -(torch.arange(0, dims, 2, device=x.device) / dims)
        angles = positions[..., None] * rates  # (..., L, dims / 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x.split((dims // 2, dims // 2, self.head_dim - dims), dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def _mask(state: AttentionState, length: int) -> Tensor:
    """(B, 1, L, T + L): of which keys each new token may see."""
    before = state.keys.shape[2]
    keys = torch.arange(before + length, device=state.seen.device)
    is_past = keys <= keys[before:, None]
    is_real = keys >= (before - state.seen)[:, None]
    return is_past & is_real[:, None, None]
