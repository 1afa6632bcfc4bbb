"""The blocks of :class:`vmamba_mm.models.CausalLM`, by their mixer, and their first weights."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from vmamba_mm.families import jamba, rwkv
from vmamba_mm.families.mamba_lm import mixers_of, with_defaults
from vmamba_mm.layers import (
    CausalAttention,
    GatedMlp,
    Mamba2Mixer,
    MambaBlock,
    MambaMixer,
    MixtureOfExperts,
    MultiScaleRetention,
    RetNetBlock,
    RWKV4TimeMix,
    RWKV5TimeMix,
    RWKV6TimeMix,
    RWKV7TimeMix,
    RWKVBlock,
    RWKVChannelMix,
)

Arch = Mapping[str, Any]


def make_block(arch: Arch, layer: int, make_norm: Callable[[], nn.Module], with_cp: bool
               ) -> nn.Module:
    """A layer's block.

    It takes and gives one stream or more, the first two of which are (hidden, residual) as of
    :class:`vmamba_mm.layers.MambaBlock`, and the state of ``block.init_state(batch)`` as ``state``.

    Args:
        arch: resolved.
        layer: the layer's number, from 0.
        make_norm: makes a norm of the stream.
        with_cp: recompute the block in the backward pass.
    """
    kind, options = mixers_of(arch).mixer_of(arch, layer)
    mixer = _KINDS[kind].mixer(arch['embed_dims'], **options)
    return _KINDS[arch['mixer']].make_block(arch, layer, mixer, make_norm, with_cp)


def init_parameters(model: nn.Module) -> None:
    """Give a :class:`vmamba_mm.models.CausalLM` the first weights that were published, where they
    are not those of its layers."""
    if model.position_embed is not None:
        nn.init.normal_(model.position_embed.weight, std=0.02)
    _KINDS[model.arch['mixer']].init(model)


# --- blocks -------------------------------------------------------------------------------------

def _mamba_block(arch: Arch, layer: int, mixer: nn.Module, make_norm, with_cp) -> MambaBlock:
    return MambaBlock(mixer, make_norm(), with_cp=with_cp)


def _rwkv_block(arch: Arch, layer: int, mixer: nn.Module, make_norm, with_cp) -> RWKVBlock:
    ffn = RWKVChannelMix(arch['embed_dims'], **rwkv.channel_options(arch, layer))
    return RWKVBlock(mixer, ffn, make_norm(), make_norm(), with_cp)


def _retnet_block(arch: Arch, layer: int, mixer: nn.Module, make_norm, with_cp) -> MambaBlock:
    options = with_defaults(arch)
    if options['ffn_dims'] == 0:
        return MambaBlock(mixer, make_norm(), with_cp=with_cp)
    mlp = GatedMlp(arch['embed_dims'], options['ffn_dims'] or mixer.v_proj.out_features,
                   options['ffn_act'])
    alpha = (2 * arch['depth']) ** 0.25 if options['deepnorm'] else 1.0
    return RetNetBlock(mixer, mlp, make_norm(), make_norm(), alpha, options['post_norm'], with_cp)


def _jamba_block(arch: Arch, layer: int, mixer: nn.Module, make_norm, with_cp) -> RetNetBlock:
    options = jamba.ffn_options(arch, layer)
    make_mlp = MixtureOfExperts if 'num_experts' in options else GatedMlp
    mlp = make_mlp(arch['embed_dims'], act='silu', **options)
    return RetNetBlock(mixer, mlp, make_norm(), make_norm(), with_cp=with_cp)


# --- first weights ------------------------------------------------------------------------------

def _init_mamba(model: nn.Module) -> None:
    """What feeds the residual stream is smaller by the root of the number of blocks."""
    nn.init.normal_(model.token_embed.weight, std=0.02)
    for block in model.blocks:
        for projection in (block.mixer.in_proj, block.mixer.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        with torch.no_grad():
            block.mixer.out_proj.weight.div_(math.sqrt(len(model.blocks)))


def _init_rwkv(model: nn.Module) -> None:
    """Of the official trainer: the embedding is nearly zero."""
    rows, dims = model.lm_head.weight.shape
    nn.init.orthogonal_(model.lm_head.weight, gain=0.5 * max(1, rows / dims) ** 0.5)
    nn.init.uniform_(model.token_embed.weight, -1e-4, 1e-4)


def _init_retnet(model: nn.Module) -> None:
    """With DeepNorm, values and what feeds the stream are smaller by (8 depth)^(1/4)."""
    for embedding in (model.token_embed, model.lm_head):
        nn.init.normal_(embedding.weight, std=model.lm_head.in_features ** -0.5)
    if not model.arch.get('deepnorm'):
        return
    for block in model.blocks:
        for part in (block.ffn.fc1, block.ffn.fc2, block.mixer.out_proj, block.mixer.v_proj):
            with torch.no_grad():
                part.weight.div_((8 * len(model.blocks)) ** 0.25)


def _init_jamba(model: nn.Module) -> None:
    """Matrices of transformers' class; dt begins in the range that Mamba gives it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and not name.endswith('dt_proj'):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)


# --- the mixers ---------------------------------------------------------------------------------

class _Kind(NamedTuple):
    mixer: type[nn.Module]
    make_block: Callable[..., nn.Module] = _mamba_block
    init: Callable[[nn.Module], None] = _init_mamba


_KINDS = {
    'mamba': _Kind(MambaMixer),
    'mamba2': _Kind(Mamba2Mixer),
    'attention': _Kind(CausalAttention),
    'rwkv4': _Kind(RWKV4TimeMix, _rwkv_block, _init_rwkv),
    'rwkv5': _Kind(RWKV5TimeMix, _rwkv_block, _init_rwkv),
    'rwkv6': _Kind(RWKV6TimeMix, _rwkv_block, _init_rwkv),
    'rwkv7': _Kind(RWKV7TimeMix, _rwkv_block, _init_rwkv),
    'retnet': _Kind(MultiScaleRetention, _retnet_block, _init_retnet),
    'jamba': _Kind(MambaMixer, _jamba_block, _init_jamba)}
