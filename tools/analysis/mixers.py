"""The mixers that the analyses of sequence models compare: the one place where one is added.

Each is a setting of :class:`vmamba_mm.models.CausalLM`, so all models differ in their mixer alone,
but for RWKV, whose blocks have a channel mixing too.
What a mixer keeps of the tokens before is found by running it, so nothing else has to be said here.
"""

from typing import NamedTuple

PIECE = 1024  # tokens


class Mixer(NamedTuple):
    label: str  #: in pictures and tables
    settings: dict  #: of CausalLM
    training: int  #: the power of the length with which the time of a training step grows in theory
    token: int  #: the same of one more token: of its time, and of the memory of all before it


MIXERS = {
    # With the short convolution that the other mixers have, so that it needs no positions.
    'attention': Mixer('softmax attention', dict(mixer='attention', attn_conv=4), 2, 1),
    'mamba': Mixer('Mamba', dict(mixer='mamba'), 1, 0),
    'mamba2': Mixer('Mamba-2', dict(mixer='mamba2'), 1, 0),
    # Without the MLP of its blocks. Of one head alone the decay would be that of 32 tokens.
    'retnet': Mixer('RetNet', dict(mixer='retnet', retention_heads=4, ffn_dims=0,
                                   tie_embeddings=True), 1, 0),
    'rwkv4': Mixer('RWKV-4', dict(mixer='rwkv4'), 1, 0),
    'rwkv6': Mixer('RWKV-6', dict(mixer='rwkv6', head_dim=32), 1, 0),
    'rwkv7': Mixer('RWKV-7', dict(mixer='rwkv7', head_dim=32), 1, 0),
}


def build(name, **settings):
    """A CausalLM with a mixer of MIXERS and the given settings, for any mixer alike."""
    from vmamba_mm.models import CausalLM

    return CausalLM(**MIXERS[name].settings | settings)


def tensors_of(state):
    """All tensors of a state: tuples, lists and dicts of them at any depth."""
    import torch

    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    return [t for item in state or () for t in tensors_of(item)] \
        if hasattr(state, '__iter__') else []


def state_after(model, length, batch=1):
    """What a model keeps of ``length`` tokens for the next one, on the model's device.

    The tokens are read in pieces, as a mask of attention has an element for each token of a piece
    and each one before.
    """
    import torch

    state = model.init_state(batch)
    tokens = torch.zeros(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        for piece in tokens.split(PIECE, dim=1):
            state = model(piece, state, logits_to_keep=1)[1]
    return state


def state_numbers(name, length, **settings):
    """How many numbers all layers of a model keep of ``length`` tokens; computes nothing."""
    import torch

    with torch.device('meta'):
        model = build(name, **settings)
        return sum(t.numel() for t in tensors_of(state_after(model, length)))


def count_flops(name, length, **settings):
    """Multiply-adds of the forward of one sequence, the head at all positions included."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device('meta'), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:
        build(name, **settings)(torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops() // 2
