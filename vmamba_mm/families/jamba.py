"""Jamba (arXiv 2403.19887, arXiv 2408.12570): layers of Mamba and of attention, with MLPs or
mixtures of experts behind them.

What :mod:`vmamba_mm.families.mamba_lm` has to know of it: options, names of weights, the
``config.json`` of transformers and its numbers.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vmamba_mm.families.base import Rows, Rule
from vmamba_mm.families.mixers import POSITIVE, Mixers, Shapes, below, depth_of
from vmamba_mm.families.parity import Build, Call, Options, Parity, Subject

#: What a layer of ``layers`` may be: its mixer, and '+moe' where experts follow in place of an MLP.
LAYERS = ('mamba', 'mamba+moe', 'attention', 'attention+moe')
_OPTIONS = dict(layers=None, d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True,
                bias=False, num_heads=1, num_kv_heads=None, ffn_dims=None, num_experts=16,
                experts_per_token=2)
_DEFAULTS = dict(norm_eps=1e-6, tie_embeddings=False, pad_vocab_size_multiple=1)
_RULES = {
    'layers': Rule(lambda v: v is None or isinstance(v, tuple | list) and len(v) > 0
                   and all(isinstance(i, str) and i in LAYERS for i in v),
                   f'None, or for each layer one of {LAYERS}', optional=True),
    'num_experts': POSITIVE,
    'experts_per_token': POSITIVE,
}
#: Of the attention of the published models; there are no more or fewer channels in a head.
_HEAD_DIM = 128


def layers_of(arch: Mapping[str, Any]) -> tuple[str, ...]:
    """What each layer is: as ``layers`` says, or as published, which is attention in the fifth of
    every eight layers, and experts in every second one."""
    return tuple(arch.get('layers') or _pattern(arch['depth'], 8, 4, 2, 1))


def _pattern(depth: int, attn_period: int, attn_offset: int, expert_period: int,
             expert_offset: int) -> tuple[str, ...]:
    return tuple(('attention' if i % attn_period == attn_offset else 'mamba')
                 + ('+moe' if i % expert_period == expert_offset else '') for i in range(depth))


def _layers_or_none(layers: tuple[str, ...]) -> tuple[str, ...] | None:
    return None if layers == layers_of(dict(depth=len(layers))) else layers


def ffn_options(arch: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Of the layer's MLP: ``hidden`` channels, and of a mixture ``num_experts`` and ``top_k``."""
    options = {**_OPTIONS, **arch}
    hidden = dict(hidden=options['ffn_dims'] or _default_hidden(arch['embed_dims']))
    if not layers_of(arch)[layer].endswith('+moe'):
        return hidden
    return hidden | dict(num_experts=options['num_experts'], top_k=options['experts_per_token'])


def _default_hidden(dims: int) -> int:
    return 7 * dims // 2


def _mixer_of(arch: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    options = {**_OPTIONS, **_DEFAULTS, **arch}
    kind = layers_of(arch)[layer].partition('+')[0]
    if kind == 'attention':
        return kind, dict(num_heads=options['num_heads'], num_kv_heads=options['num_kv_heads'],
                          qkv_bias=False, out_bias=False, split_proj=True)
    keys = ('d_state', 'd_conv', 'expand', 'dt_rank', 'conv_bias', 'bias', 'norm_eps')
    return 'mamba', dict(inner_norms=True, **{key: options[key] for key in keys})


def _check(arch: Mapping[str, Any]) -> None:
    options = {**_OPTIONS, **arch}
    if options['layers'] is not None and len(options['layers']) != arch['depth']:
        raise ValueError(f"arch['layers'] says what {len(options['layers'])} layers are, and "
                         f"arch['depth'] is {arch['depth']}")
    if options['ffn_dims'] == 0:
        raise ValueError("arch['ffn_dims'] of the mixer 'jamba' must be None or an int of at "
                         'least 1')
    if options['experts_per_token'] > options['num_experts']:
        raise ValueError(f"arch['experts_per_token']={options['experts_per_token']} must be at "
                         f"most arch['num_experts']={options['num_experts']}")
    if arch.get('norm', 'rms') != 'rms':
        raise ValueError("arch['norm'] of the mixer 'jamba' must be 'rms'")


def _arch(embed_dims: int, depth: int, **more: Any) -> dict[str, Any]:
    return dict(mixer='jamba', vocab_size=65536, embed_dims=embed_dims, depth=depth,
                num_kv_heads=8, **more)


_ARCHS = {'jamba-v0.1': _arch(4096, 32, num_heads=32),
          'jamba-1.5-large': _arch(8192, 72, num_heads=64, ffn_dims=24576)}


# --- names of weights ---------------------------------------------------------------------------

_MLP = (('gate_proj', 'fc1'), ('up_proj', 'gate'), ('down_proj', 'fc2'))
_OF_LAYER = (
    ('input_layernorm', 'norm'), ('pre_ff_layernorm', 'ffn_norm'),
    *((f'mamba.{part}_layernorm', f'mixer.{part}_norm') for part in ('dt', 'b', 'c')),
    ('mamba.out_proj', 'mixer.out_proj'), ('mamba', 'mixer'),
    ('self_attn.o_proj', 'mixer.out_proj'), ('self_attn', 'mixer'),
    *((f'feed_forward.experts.#.{theirs}', f'ffn.experts.#.{ours}') for theirs, ours in _MLP),
    *((f'feed_forward.{theirs}', f'ffn.{ours}') for theirs, ours in _MLP),
    ('feed_forward.router', 'ffn.router'))
_KEYS = (
    ('model.embed_tokens', 'token_embed'), ('model.final_layernorm', 'norm'),
    *((f'model.layers.#.{theirs}', f'blocks.#.{ours}') for theirs, ours in _OF_LAYER),
    ('lm_head', 'lm_head'))
#: Where the head is tied there is none in a file, and what all names then begin with is taken off.
_KEYS += tuple((theirs.removeprefix('model.'), ours) for theirs, ours in _KEYS[:-1])


def _keys(names: Collection[str]) -> Rows:
    """Our names do not tell the kind of a layer, all others of the model do."""
    found = (re.match(r'blocks\.(\d+)\.mixer\.q_proj\.', name) for name in names)
    layers = sorted({int(match[1]) for match in found if match})
    of_attention = ((f'model.layers.{i}.self_attn{theirs}', f'blocks.{i}.mixer{ours}')
                    for i in layers for theirs, ours in (('.o_proj', '.out_proj'), ('', '')))
    return (*of_attention, *_KEYS)


_OWN_NAMES = re.compile(r'feed_forward\.|(?:^|\.)mixer\.(?:dt_norm|q_proj)\.')


def _infer(shapes: Shapes) -> dict[str, Any]:
    """How many experts a token goes through leaves no trace, and is as published; heads are, where
    they may be."""
    rows, dims = shapes['token_embed.weight']
    blocks = [below(f'blocks.{i}.', shapes) for i in range(depth_of(shapes))]
    layers = tuple(('attention' if 'mixer.q_proj.weight' in block else 'mamba')
                   + ('+moe' if 'ffn.router.weight' in block else '') for block in blocks)
    arch: dict[str, Any] = dict(mixer='jamba', vocab_size=rows, layers=_layers_or_none(layers))
    for block in blocks:
        if 'mixer.A_log' in block:
            inner, d_state = block['mixer.A_log']
            _, rank = block['mixer.dt_proj.weight']
            arch |= dict(d_state=d_state, d_conv=block['mixer.conv1d.weight'][2],
                         expand=inner // dims if inner % dims == 0 else inner / dims,
                         dt_rank='auto' if rank == -(-dims // 16) else rank,
                         conv_bias='mixer.conv1d.bias' in block, bias='mixer.in_proj.bias' in block)
        else:
            arch |= _heads(block['mixer.q_proj.weight'][0], block['mixer.k_proj.weight'][0])
        if 'ffn.router.weight' in block:
            arch['num_experts'], _ = block['ffn.router.weight']
        hidden = next(shape[0] for name, shape in block.items() if name.endswith('fc1.weight'))
        arch['ffn_dims'] = None if hidden == _default_hidden(dims) else hidden
    return arch


def _heads(queries: int, keys: int) -> dict[str, Any]:
    width = _HEAD_DIM if queries % _HEAD_DIM == 0 and keys % _HEAD_DIM == 0 else keys
    return dict(num_heads=queries // width,
                num_kv_heads=None if keys == queries else keys // width)


def _untold(arch: Mapping[str, Any]) -> tuple[str, str]:
    if not any(layer.startswith('attention') for layer in layers_of(arch)):
        return '', ''
    return 'num_heads', ('how many heads the attention has; give from_pretrained its num_heads and '
                         'num_kv_heads, or the folder with config.json')


# --- config.json --------------------------------------------------------------------------------

def _arch_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, *wanted in (('hidden_act', 'silu'), ('sliding_window', None)):
        if config.get(key, wanted[0]) not in wanted:
            raise ValueError(f'{key} is {config[key]!r}, which has no counterpart here, only '
                             f'{wanted[0]!r}')
    dims, depth = config['hidden_size'], config['num_hidden_layers']
    heads, experts = config['num_attention_heads'], config.get('num_experts', 16)
    layers = _pattern(depth, config.get('attn_layer_period', 8), config.get('attn_layer_offset', 4),
                      config.get('expert_layer_period', 2), config.get('expert_layer_offset', 1))
    if experts == 1:  # is a plain MLP there
        layers, experts = tuple(layer.partition('+')[0] for layer in layers), 16
    kv_heads, hidden = config.get('num_key_value_heads', 8), config['intermediate_size']
    rank = config.get('mamba_dt_rank', 'auto')
    return dict(
        mixer='jamba', vocab_size=config['vocab_size'], embed_dims=dims, depth=depth,
        layers=_layers_or_none(layers), num_heads=heads,
        num_kv_heads=None if kv_heads in (None, heads) else kv_heads,
        ffn_dims=None if hidden == _default_hidden(dims) else hidden, num_experts=experts,
        experts_per_token=config.get('num_experts_per_tok', 2),
        d_state=config.get('mamba_d_state', 16), d_conv=config.get('mamba_d_conv', 4),
        expand=config.get('mamba_expand', 2),
        dt_rank='auto' if rank == -(-dims // 16) else rank,
        conv_bias=config.get('mamba_conv_bias', True), bias=config.get('mamba_proj_bias', False),
        norm_eps=config.get('rms_norm_eps', 1e-6),
        tie_embeddings=config.get('tie_word_embeddings', False))


MIXERS = Mixers(
    options={'jamba': _OPTIONS}, rules=_RULES, mixer_of=_mixer_of, keys=_keys, infer=_infer,
    own_names=_OWN_NAMES, defaults=_DEFAULTS, archs=_ARCHS, check=_check, untold=_untold,
    configs={'jamba': _arch_of_config})


# --- numbers of transformers --------------------------------------------------------------------

_MIXER = (('dt_layernorm', 'dt_norm'), ('b_layernorm', 'b_norm'), ('c_layernorm', 'c_norm'))


def _mixer_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    names = dict(_MIXER)
    return {'.'.join(names.get(part, part) for part in name.split('.')): value
            for name, value in weights.items()}


def _subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    if 'num_hidden_layers' not in kwargs:
        build = Build('vmamba_mm.layers:MambaMixer', dict(
            embed_dims=kwargs['hidden_size'], d_state=kwargs['mamba_d_state'],
            d_conv=kwargs['mamba_d_conv'], expand=kwargs['mamba_expand'],
            dt_rank=kwargs['mamba_dt_rank'], norm_eps=kwargs['rms_norm_eps'], inner_norms=True))
        call = Call(args=('input',), kwargs={'attention_mask': 'mask'},
                    run='vmamba_mm.testing_language:run_jamba_mixer', compared='attention_mask')
        return Subject(build, call, convert=_mixer_names)
    for key in kwargs:
        kwargs.ignore(key)  # the config has the same values, and the defaults
    options.ignore('config')
    build = Build('vmamba_mm.models:CausalLM', _arch_of_config(options['config']))
    return Subject(build, _call)


def _call(case: Options) -> Call:
    return Call(args=('input',), run='vmamba_mm.testing_language:run_jamba',
                kwargs={'attention_mask': 'mask', 'prefill_length': 'prefill'},
                compared='attention_mask')


PARITY = Parity(subject=_subject)
