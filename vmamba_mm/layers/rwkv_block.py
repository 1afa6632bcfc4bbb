"""The residual block of RWKV."""

from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.mamba_blocks import add_and_norm
from vmamba_mm.layers.rwkv import RWKV7TimeMix, RWKVChannelMix, TimeMixState


class RWKVState(NamedTuple):
    """What a block keeps of the tokens that it has seen."""

    mixer: TimeMixState
    last: Tensor  #: (B, C), the last token of the channel mixing


class RWKVBlock(nn.Module):
    """Add, norm, time mixing, add, norm, channel mixing, with the two streams of ``MambaBlock``.

    Args:
        mixer: a time mixing, such as :class:`RWKV7TimeMix`.
        ffn: a :class:`RWKVChannelMix`.
        norm, ffn_norm: of the last dimension, before the two.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, T, C) twice -> (hidden, residual) of the same shape. Blocks of RWKV-7 take and give a
    third stream, the values of the first layer, (B, T, C).
    """

    def __init__(self, mixer: nn.Module, ffn: RWKVChannelMix, norm: nn.Module, ffn_norm: nn.Module,
                 with_cp: bool = False):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.ffn = ffn
        self.ffn_norm = ffn_norm
        self.with_cp = with_cp
        self.shares_values = isinstance(mixer, RWKV7TimeMix)

    def forward(self, hidden: Tensor, residual: Tensor | None = None,
                first_value: Tensor | None = None, *, state: RWKVState | None = None
                ) -> tuple[Tensor | RWKVState, ...]:
        """The new streams, then the new state, if one is given.

        Args:
            hidden: (B, T, C).
            residual: (B, T, C), or None for the first block.
            first_value: (B, T, C), of RWKV-7, or None for the first block.
            state: of the tokens before, which is not changed.
        """
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                self._forward, hidden, residual, first_value, state, use_reentrant=False)
        return self._forward(hidden, residual, first_value, state)

    def _forward(self, hidden, residual, first_value, state):
        residual, x = add_and_norm(self.norm, hidden, residual)
        shared = dict(first_value=first_value) if self.shares_values else {}
        if state is None:
            found = self.mixer(x, **shared)
            y, *more = found if self.shares_values else (found,)
        else:
            y, *more, mixed = self.mixer(x, state.mixer, **shared)
        residual, x = add_and_norm(self.ffn_norm, y, residual)
        if state is None:
            return self.ffn(x), residual, *more
        y, last = self.ffn(x, state.last)
        return y, residual, *more, RWKVState(mixed, last)

    def init_state(self, batch: int) -> RWKVState:
        """The state before the first token, of ``batch`` sequences."""
        return RWKVState(self.mixer.init_state(batch), self.ffn.init_state(batch))
