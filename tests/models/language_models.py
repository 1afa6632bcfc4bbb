"""Small language models for tests of CausalLM, and their weights as other libraries name them."""

import pytest
import torch

from vmamba_mm.models import CausalLM

TINY = dict(mixer='mamba', vocab_size=29, embed_dims=16, depth=3, d_state=4)
#: Every option at a value of its own.
OTHER = dict(TINY, d_conv=3, expand=1.5, dt_rank=2, conv_bias=False, bias=True,
             tie_embeddings=False, pad_vocab_size_multiple=1)
MAMBA2 = dict(mixer='mamba2', vocab_size=29, embed_dims=16, depth=3, d_state=4, head_dim=8)
OTHER2 = dict(MAMBA2, d_conv=3, expand=1.5, head_dim=4, n_groups=2, d_ssm=16,
              norm_before_gate=True, D_has_hdim=True, dt_limit=(0.01, 0.5), conv_bias=False,
              bias=True, norm='layer', tie_embeddings=False, pad_vocab_size_multiple=1)
ATTENTION = dict(mixer='attention', vocab_size=29, embed_dims=16, depth=2, num_heads=2,
                 norm='layer', max_positions=64, embed_norm=True, drop_rate=0.1, attn_drop_rate=0.1)
HYBRID = dict(MAMBA2, attn_layers=(0, 2), num_heads=4, num_kv_heads=2, attn_head_dim=6,
              attn_conv=4, rotary_dims=4, qkv_bias=False, out_bias=False)
RETNET = dict(mixer='retnet', vocab_size=29, embed_dims=16, depth=2, retention_heads=2,
              value_dims=24, ffn_dims=20)
DEEPNORM = dict(RETNET, depth=3, retention_form='parallel', ffn_act='silu', deepnorm=True,
                post_norm=True, scale_embedding=True, embed_norm=True, tie_embeddings=True)
#: Every option at a value of its own.
JAMBA = dict(mixer='jamba', vocab_size=29, embed_dims=16, depth=4, num_heads=4, num_kv_heads=2,
             layers=('mamba', 'attention+moe', 'mamba+moe', 'attention'), d_state=4, d_conv=3,
             expand=1.5, dt_rank=2, bias=True, ffn_dims=20, num_experts=4, experts_per_token=3)
_RWKV = dict(vocab_size=29, embed_dims=16, depth=3)
#: Every option at a value of its own.
RWKVS = dict(
    rwkv4=dict(_RWKV, mixer='rwkv4', att_dims=24, ffn_dims=40),
    rwkv5=dict(_RWKV, mixer='rwkv5', head_dim=4, att_dims=24, ffn_dims=40, head_divisor=2),
    rwkv6=dict(_RWKV, mixer='rwkv6', head_dim=4, att_dims=24, ffn_dims=40, head_divisor=2,
               mix_rank=3, decay_rank=5),
    rwkv7=dict(_RWKV, mixer='rwkv7', head_dim=4, ffn_dims=40, decay_rank=3, rate_rank=5,
               value_rank=2, gate_rank=7))
#: Those with the names of mamba_ssm, whose blocks have nothing beside the mixer.
MAMBAS = dict(tiny=TINY, other=OTHER, mamba2=MAMBA2, other2=OTHER2, attention=ATTENTION,
              hybrid=HYBRID)
ARCHS = MAMBAS | RWKVS | dict(retnet=RETNET, deepnorm=DEEPNORM, jamba=JAMBA)


def each(archs):
    return pytest.mark.parametrize('arch', archs.values(), ids=archs)


each_arch, each_mamba, each_rwkv = each(ARCHS), each(MAMBAS), each(RWKVS)
each_with_stream = each({name: arch for name, arch in ARCHS.items() if name != 'deepnorm'})
each_scan = each(dict(tiny=TINY, other=OTHER, mamba2=MAMBA2, other2=OTHER2) | RWKVS)
each_device = pytest.mark.parametrize('device', ['cpu', 'cuda'])


def random_model(arch=TINY, **kwargs):
    """Every parameter is random, and logits differ enough to tell tokens apart."""
    torch.manual_seed(0)
    model = CausalLM(arch, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens_of(*shape, vocab_size=29, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def transformers_state(model):
    """Its weights by the names of transformers, which leaves a tied head out."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith('blocks.'):
            name = f'backbone.layers.{name.removeprefix("blocks.")}'
        for ours, theirs in (('token_embed', 'embeddings'), ('norm', 'norm_f'),
                             ('position_embed', 'position_embed'), ('embed_norm', 'embed_norm')):
            if name.startswith(f'{ours}.'):
                name = f'backbone.{theirs}{name.removeprefix(ours)}'
                break
        if name != 'lm_head.weight' or not model.is_tied:
            state[name] = value
    return state


def mamba_ssm_state(model):
    state = {name.replace('.embeddings.', '.embedding.'): value
             for name, value in transformers_state(model).items()}
    return state | {'lm_head.weight': model.lm_head.weight.detach()}
