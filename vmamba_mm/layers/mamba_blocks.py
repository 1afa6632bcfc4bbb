"""Blocks of S6 mixers one after the other: in inference on an NVIDIA GPU as one op."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.mamba import (
    BiMambaMixer,
    MambaBlock,
    MambaMixer,
    dtype_of_products,
    is_depthwise_causal,
)
from vmamba_mm.layers.norm import RMSNorm
from vmamba_mm.layers.plain import Attributes, are_plain
from vmamba_mm.ops.core.backends import runs_kernels, wants_grad
from vmamba_mm.ops.mamba_blocks import Direction, Weights, mamba_blocks, why_not

_NOT_PLAIN = 'a module has a hook, is wrapped, or is of another class'
_CLASSES = (MambaBlock, DropPath, RMSNorm, nn.Linear, nn.Linear)
_OF_DIRECTION = (nn.Conv1d, nn.Linear, nn.Linear)


def run_blocks(blocks: Sequence[nn.Module], hidden: Tensor, residual: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
    """The streams after all of ``blocks``, each of which is a :class:`MambaBlock`.

    Without gradients all of them run as one op where their mixers are plain :class:`MambaMixer` or
    :class:`BiMambaMixer` on an NVIDIA GPU (:func:`why_not_one_op`), else one after the other.

    Args:
        blocks: at least one.
        hidden: (B, L, C).
        residual: (B, L, C), or None if the first of them is the model's.

    Returns:
        (hidden, residual), each (B, L, C).
    """
    weights = _weights_for_op(blocks, hidden, residual)
    if isinstance(weights, str):
        for block in blocks:
            hidden, residual = block(hidden, residual)
        return hidden, residual
    residual, hidden = mamba_blocks(hidden, residual, weights, blocks[0].norm.eps,
                                    _scale(blocks[0].mixer), dtype_of_products(hidden))
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
    weights = _weights_for_op(blocks, hidden, residual)
    return weights if isinstance(weights, str) else None


def _scale(mixer: nn.Module) -> float:
    """The factor of the sum of the mixer's directions."""
    return 0.5 if getattr(mixer, 'reduce', 'sum') == 'mean' else 1.0


def _weights_for_op(blocks: Sequence[nn.Module], hidden: Tensor, residual: Tensor | None
                    ) -> list[Weights] | str:
    """The parameters of each block for the op ``mamba_blocks``, or what keeps them from it."""
    if not runs_kernels(hidden):
        return 'the input is not on a GPU'
    if torch.jit.is_tracing():  # which runs with and without gradients, and compares
        trains = wants_grad(hidden, *(p for block in blocks for p in block.parameters()))
    else:
        trains = torch.is_grad_enabled()
    if trains:
        return 'gradients are wanted'
    all_weights, first_kind = [], None
    for block in blocks:
        weights = _weights_of(block)
        if isinstance(weights, str):
            return weights
        kind = (block.norm.eps, _scale(block.mixer), *[(t.dtype, t.shape) for t in weights.flat])
        if kind != (first_kind := first_kind or kind):
            return 'blocks differ in eps, in the sum of directions, or in shapes or dtypes'
        all_weights.append(weights)
    return why_not(hidden, residual, all_weights[0], dtype_of_products(hidden)) or all_weights


def _weights_of(block: nn.Module) -> Weights | str:
    # Past nn.Module.__getattr__, as a small batch waits for the questions of all blocks.
    modules = block._modules
    mixer, drop = modules.get('mixer'), modules.get('drop_path')
    if type(mixer) not in (MambaMixer, BiMambaMixer):
        return 'a mixer is of another class than MambaMixer and BiMambaMixer'
    inner = mixer._modules
    if inner.get('norm') is not None or mixer._parameters['gamma'] is not None:
        return 'a mixer has a norm or a layer scale'
    directions = [(inner[f'conv1d{suffix}'], inner[f'x_proj{suffix}'], inner[f'dt_proj{suffix}'])
                  for suffix in mixer.directions]
    parts = (block, drop, modules['norm'], inner['in_proj'], inner['out_proj'],
             *[module for direction in directions for module in direction])
    if not are_plain((mixer, *parts), (type(mixer), *_CLASSES, *_OF_DIRECTION * len(directions))):
        return _NOT_PLAIN
    if drop.training and drop.drop_prob > 0:
        return 'a block drops paths'
    if not all([is_depthwise_causal(conv) for conv, _, _ in directions]):
        return 'a convolution is not depthwise and causal'
    try:
        return _gather(mixer.directions, mixer._parameters, *[m._parameters for m in parts[2:]])
    except KeyError:
        return _gather(mixer.directions, *map(Attributes, (mixer, *parts[2:])))


def _gather(suffixes, mixer, norm, in_proj, out_proj, *of_directions) -> Weights | str:
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
    return Weights(norm['weight'], in_proj['weight'], out_proj['weight'], tuple(directions))
