"""The residual block of RWKV, and blocks one after the other."""

from collections.abc import Sequence
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
        channel_mixer: a :class:`RWKVChannelMix`.
        norm, norm2: of the last dimension, before the two.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, T, C) twice -> (hidden, residual) of the same shape, and the values of the first
    layer of RWKV-7, (B, T, C), else None; with a state the new one follows.
    """

    def __init__(self, mixer: nn.Module, channel_mixer: RWKVChannelMix, norm: nn.Module,
                 norm2: nn.Module, with_cp: bool = False):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.channel_mixer = channel_mixer
        self.norm2 = norm2
        self.with_cp = with_cp

    def forward(self, hidden: Tensor, residual: Tensor | None = None,
                first_value: Tensor | None = None, *, state: RWKVState | None = None
                ) -> tuple[Tensor | RWKVState | None, ...]:
        """The new streams, the values of the first layer, then the new state, if one is given.

        Args:
            hidden: (B, T, C).
            residual: (B, T, C), or None for the first block.
            first_value: what the block before returned, of RWKV-7.
            state: of the tokens before, which is not changed.
        """
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                self._forward, hidden, residual, first_value, state, use_reentrant=False)
        return self._forward(hidden, residual, first_value, state)

    def _forward(self, hidden, residual, first_value, state):
        residual, x = add_and_norm(self.norm, hidden, residual)
        args = (x,) if state is None else (x, state.mixer)
        if isinstance(self.mixer, RWKV7TimeMix):
            y, first_value, *new = self.mixer(*args, first_value=first_value)
        elif state is None:
            y, new = self.mixer(*args), ()
        else:
            y, *new = self.mixer(*args)
        residual, x = add_and_norm(self.norm2, y, residual)
        if state is None:
            return self.channel_mixer(x), residual, first_value
        y, last = self.channel_mixer(x, state.last)
        return y, residual, first_value, RWKVState(*new, last)

    def init_state(self, batch: int) -> RWKVState:
        """The state before the first token, of ``batch`` sequences."""
        return RWKVState(self.mixer.init_state(batch), self.channel_mixer.init_state(batch))


def run_rwkv_blocks(blocks: Sequence[nn.Module], hidden: Tensor,
                    states: Sequence[RWKVState] | None = None
                    ) -> tuple[Tensor, Tensor, tuple[RWKVState, ...]]:
    """The streams after all of ``blocks``, each of which is a :class:`RWKVBlock`.

    Args:
        blocks: at least one.
        hidden: (B, T, C).
        states: one for each block, of the tokens before; None if there are none.

    Returns:
        (hidden, residual), each (B, T, C), and the new states, none without old ones.
    """
    residual = first_value = None
    new = []
    for i, block in enumerate(blocks):
        options = {} if states is None else dict(state=states[i])
        hidden, residual, first_value, *of_block = block(hidden, residual, first_value, **options)
        new += of_block
    return hidden, residual, tuple(new)
