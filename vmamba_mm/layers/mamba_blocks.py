"""The residual block around an S6 mixer, and blocks one after the other.

There are three ways through blocks, with the same result. Inference on an NVIDIA GPU runs all of
them as one op, ``mamba_blocks``; else each block runs by itself, as one op, ``mamba_block``, or
step by step. ``why_not_one_op`` of blocks or a block says what keeps them from the faster way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.mamba import BiMambaMixer, MambaMixer, MambaState, is_depthwise_causal
from vmamba_mm.layers.norm import LayerNorm, RMSNorm, sum_and_norm
from vmamba_mm.layers.plain import Attributes, are_plain
from vmamba_mm.ops.core.backends import autocast_dtype, compute_dtype, runs_kernels, wants_grad
from vmamba_mm.ops.mamba_blocks import (
    Direction,
    Weights,
    flatten,
    mamba_block,
    mamba_blocks,
    why_not,
)

# What torch.fx records as it is, since it looks at dtypes.
torch.fx.wrap('_stream')
torch.fx.wrap('_dtype_of_products')


class MambaBlock(nn.Module):
    """Add, norm, mixer: the block that goes round with two streams.

    ``residual`` is the sum of all that came before, in fp32; ``hidden`` the last block's result,
    which is added to it first. Before the first block there is no residual. After the last one
    comes ``sum_and_norm(norm, residual, hidden)``.

    Args:
        mixer: a module of tokens, such as :class:`BiMambaMixer`.
        norm: of the last dimension, of the mixer's input.
        drop_path: probability to drop the mixer's result for a sample.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, L, C) twice -> (hidden, residual) of the same shape.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0,
                 with_cp: bool = False):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path)
        self.with_cp = with_cp

    def forward(self, hidden: Tensor, residual: Tensor | None = None, *, with_output: bool = False,
                state: MambaState | None = None) -> tuple[Tensor, ...]:
        """The new streams, then the mixer's result, then the new state, each if it was asked for.

        Args:
            hidden: (B, L, C).
            residual: (B, L, C), or None for the first block.
            with_output: also return the mixer's result before paths are dropped.
            state: for the mixer: :class:`MambaMixer`'s.
        """
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                self._forward, hidden, residual, with_output, state, use_reentrant=False)
        return self._forward(hidden, residual, with_output, state)

    def _forward(self, hidden, residual, with_output, state):
        if state is None:
            weights = _weights_for_op(self, hidden, residual)
            if not isinstance(weights, str):
                residual, y = _run_op(self, weights, hidden, residual)
                return (self.drop_path(y), residual, *((y,) if with_output else ()))
        residual, x = add_and_norm(self.norm, hidden, residual)
        if state is None:
            y, states = self.mixer(x), ()
        else:
            y, *states = self.mixer(x, state)
        return (self.drop_path(y), residual, *((y,) if with_output else ()), *states)

    def step(self, hidden: Tensor, residual: Tensor | None, state: MambaState
             ) -> tuple[Tensor, Tensor, MambaState]:
        """One more token: (B, C) and the mixer's state to (hidden, residual, state)."""
        residual, x = add_and_norm(self.norm, hidden, residual)
        y, state = self.mixer.step(x, state)
        return self.drop_path(y), residual, state

    def why_not_one_op(self, hidden: Tensor, residual: Tensor | None = None) -> str | None:
        """The reason why the block does not run as one op on its streams, but step by step, or
        None."""
        weights = _weights_for_op(self, hidden, residual)
        return weights if isinstance(weights, str) else None

    def init_state(self, batch: int) -> Any:
        """The mixer's state before the first token, of ``batch`` sequences."""
        return self.mixer.init_state(batch)


def add_and_norm(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The new residual stream, in fp32 at least, and its norm in the dtype of matrix products."""
    dtype = _dtype_of_products(hidden)
    if residual is None:
        residual = _stream(hidden)
        return residual, norm(residual).to(dtype)
    return sum_and_norm(norm, residual, hidden, out_dtype=dtype)


def _stream(hidden: Tensor) -> Tensor:
    """The residual stream that begins with ``hidden``: in fp32 at least."""
    return hidden.to(compute_dtype(hidden.dtype))


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products around the stream, to which the norm's result is rounded."""
    return autocast_dtype(hidden) or hidden.dtype


def run_blocks(blocks: Sequence[nn.Module], hidden: Tensor, residual: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
    """The streams after all of ``blocks``, each of which is a :class:`MambaBlock`.

    Without gradients all of them run as one op where their mixers are plain :class:`MambaMixer` or
    :class:`BiMambaMixer`, and their norms :class:`RMSNorm` or :class:`LayerNorm`, on an NVIDIA GPU,
    else one after the other; ``why_not_one_op`` of this
    module says why.

    Args:
        blocks: at least one.
        hidden: (B, L, C).
        residual: (B, L, C), or None if the first of them is the model's.

    Returns:
        (hidden, residual), each (B, L, C).
    """
    weights = _all_weights_for_op(blocks, hidden, residual)
    if isinstance(weights, str):
        for block in blocks:
            hidden, residual = block(hidden, residual)
        return hidden, residual
    residual, hidden = mamba_blocks(hidden, residual, weights, blocks[0].norm.eps,
                                    _scale(blocks[0].mixer), _dtype_of_products(hidden))
    return hidden, residual


def run_blocks_to(indices: Sequence[int], blocks: Sequence[nn.Module], hidden: Tensor
                  ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """The streams after some of a model's blocks.

    Args:
        indices: increasing numbers of blocks; none after the last one runs.
        blocks: as of :func:`run_blocks`.
        hidden: (B, L, C), the tokens.

    Yields:
        Each of ``indices``, and (hidden, residual) after it.
    """
    blocks, begin, streams = list(blocks), 0, (hidden,)
    for i in indices:
        streams = run_blocks(blocks[begin:i + 1], *streams)
        begin = i + 1
        yield i, streams


def why_not_one_op(blocks: Sequence[nn.Module], hidden: Tensor, residual: Tensor | None = None
                   ) -> str | None:
    """The reason why :func:`run_blocks` does not run ``blocks`` as one op, or None."""
    weights = _all_weights_for_op(blocks, hidden, residual)
    return weights if isinstance(weights, str) else None


# --- whether a block, or several, run as one op ---------------------------------------------------

_NOT_ON_GPU = 'the input is not on a GPU'  # or torch.fx records the steps
_NOT_PLAIN = 'a module has a hook, is wrapped, or is of another class'
_OF_PRODUCTS = (nn.Linear, nn.Linear)
_OF_DIRECTION = (nn.Conv1d, nn.Linear, nn.Linear)


def _scale(mixer: nn.Module) -> float:
    """The factor of the sum of the mixer's directions."""
    return 0.5 if getattr(mixer, 'reduce', 'sum') == 'mean' else 1.0


def _run_op(block: MambaBlock, weights: Weights, hidden: Tensor, residual: Tensor | None
            ) -> tuple[Tensor, Tensor]:
    """The new residual and the mixer's result, for ``weights`` of :func:`_weights_for_op`."""
    settings = block.norm.eps, _scale(block.mixer), _dtype_of_products(hidden)
    if wants_grad(hidden, residual, *flatten(weights)):
        return mamba_block(hidden, residual, weights, *settings)
    return mamba_blocks(hidden, residual, [weights], *settings)


def _weights_for_op(block: MambaBlock, hidden: Tensor, residual: Tensor | None) -> Weights | str:
    """The parameters of a block for the ops, or what keeps it from them."""
    if not runs_kernels(hidden):
        return _NOT_ON_GPU
    weights, dtype = _weights_of(block), _dtype_of_products(hidden)
    if isinstance(weights, str):
        return weights
    if (residual is None or hidden.dtype != dtype) \
            and wants_grad(hidden, residual, *flatten(weights)):
        return 'it is the first block, or what comes in is not in the dtype of matrix products'
    return why_not(hidden, residual, weights, dtype) or weights


def _all_weights_for_op(blocks: Sequence[nn.Module], hidden: Tensor, residual: Tensor | None
                        ) -> list[Weights] | str:
    """The parameters of each block for the op ``mamba_blocks``, or what keeps them from it."""
    if not runs_kernels(hidden):
        return _NOT_ON_GPU
    if torch.jit.is_tracing():  # which runs with and without gradients, and compares
        trains = wants_grad(hidden, *(p for block in blocks for p in block.parameters()))
    else:
        trains = torch.is_grad_enabled()
    if trains:
        return 'gradients are wanted'
    all_weights, first_kind = [], None
    for block in blocks:
        drop = block._modules.get('drop_path')
        if not are_plain((block, drop), (MambaBlock, DropPath)):
            return _NOT_PLAIN
        if drop.training and drop.drop_prob > 0:
            return 'a block drops paths'
        weights = _weights_of(block)
        if isinstance(weights, str):
            return weights
        kind = (block.norm.eps, _scale(block.mixer),
                *[(t.dtype, t.shape) for t in flatten(weights)])
        if kind != (first_kind := first_kind or kind):
            return 'blocks differ in norms, in the sum of directions, or in shapes or dtypes'
        all_weights.append(weights)
    return why_not(hidden, residual, all_weights[0], _dtype_of_products(hidden)) or all_weights


def _weights_of(block: MambaBlock) -> Weights | str:
    # Past nn.Module.__getattr__, as a small batch waits for the questions of all blocks.
    modules = block._modules
    mixer = modules['mixer']
    if type(mixer) is not BiMambaMixer and type(mixer) is not MambaMixer:
        return 'a mixer is of another class than MambaMixer and BiMambaMixer'
    inner = mixer._modules
    if inner.get('norm') is not None or inner.get('dt_norm') is not None \
            or mixer.gamma is not None:
        return 'a mixer has a norm or a layer scale'
    directions = [(inner[f'conv1d{suffix}'], inner[f'x_proj{suffix}'], inner[f'dt_proj{suffix}'])
                  for suffix in mixer.directions]
    norm = LayerNorm if type(modules['norm']) is LayerNorm else RMSNorm
    parts = (modules['norm'], inner['in_proj'], inner['out_proj'],
             *[module for direction in directions for module in direction])
    if not are_plain((mixer, *parts), (type(mixer), norm, *_OF_PRODUCTS,
                                       *_OF_DIRECTION * len(directions))):
        return _NOT_PLAIN
    if not all([is_depthwise_causal(conv) for conv, _, _ in directions]):
        return 'a convolution is not depthwise and causal'
    try:
        return _gather(norm, mixer.directions, mixer._parameters, *[m._parameters for m in parts])
    except KeyError:
        return _gather(norm, mixer.directions, *map(Attributes, (mixer, *parts)))


def _gather(kind, suffixes, mixer, norm, in_proj, out_proj, *of_directions) -> Weights | str:
    """The weights by those of the modules; what keeps them from the op, if a user has put a module
    in the place of ours that has a bias more or less."""
    directions = []
    for suffix, conv, x_proj, dt_proj in zip(suffixes, *[of_directions[i::3] for i in range(3)],
                                             strict=True):
        if conv['bias'] is None or dt_proj['bias'] is None or x_proj['bias'] is not None:
            return 'a mixer has a bias more or less than those of Mamba'
        directions.append(Direction(
            conv['weight'], conv['bias'], x_proj['weight'], dt_proj['weight'], dt_proj['bias'],
            mixer[f'A{suffix}_log'], mixer[f'D{suffix}']))
    if in_proj['bias'] is not None or out_proj['bias'] is not None:
        return 'a mixer has a bias more or less than those of Mamba'
    norm_bias = norm['bias'] if kind is LayerNorm else None
    if norm['weight'] is None or kind is LayerNorm and norm_bias is None:
        return 'a norm lacks its weight or bias'
    return Weights(norm['weight'], norm_bias, in_proj['weight'], out_proj['weight'],
                   tuple(directions))
