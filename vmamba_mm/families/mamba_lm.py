"""Language models of Mamba (arXiv 2312.00752): the five published sizes, and names of weights."""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, is_number

#: The tokens of the published models' vocabulary, that of GPT-NeoX with its added tokens.
_TOKENS = 50277
#: What an arch need not say, as published.
DEFAULTS = dict(d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True, bias=False,
                norm_eps=1e-5, tie_embeddings=True, pad_vocab_size_multiple=8)


def _arch(embed_dims: int, depth: int) -> dict[str, Any]:
    return dict(mixer='mamba', vocab_size=_TOKENS, embed_dims=embed_dims, depth=depth)


ARCHS = {
    'mamba-130m': _arch(768, 24),
    'mamba-370m': _arch(1024, 48),
    'mamba-790m': _arch(1536, 48),
    'mamba-1.4b': _arch(2048, 48),
    'mamba-2.8b': _arch(2560, 64),
}

_POSITIVE = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False').or_absent()
RULES = {
    'mixer': Rule(lambda v: v == 'mamba', "'mamba'"),
    'vocab_size': _POSITIVE,
    'embed_dims': _POSITIVE,
    'depth': _POSITIVE,
    'd_state': _POSITIVE.or_absent(),
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
    'conv_bias': _BOOL,
    'bias': _BOOL,
    'norm_eps': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'tie_embeddings': _BOOL,
    'pad_vocab_size_multiple': _POSITIVE.or_absent(),
}


def _check(arch: Mapping[str, Any]) -> None:
    expand = arch.get('expand', DEFAULTS['expand'])
    if int(expand * arch['embed_dims']) == 0:
        raise ValueError(f"arch['expand']={expand!r} leaves the mixer no channel of the "
                         f'{arch["embed_dims"]} of embed_dims; it must be at least '
                         f'1/{arch["embed_dims"]}')


def padded_vocab_size(arch: Mapping[str, Any]) -> int:
    """The rows of the embedding, and the logits of a token."""
    multiple = arch.get('pad_vocab_size_multiple', DEFAULTS['pad_vocab_size_multiple'])
    return -(-arch['vocab_size'] // multiple) * multiple


# --- weights ------------------------------------------------------------------------------------

KEYS = (
    ('backbone.embedding', 'token_embed'),
    ('backbone.embeddings', 'token_embed'),  # of transformers
    ('backbone.layers.#', 'blocks.#'),
    ('backbone.norm_f', 'norm'),
    ('lm_head', 'lm_head'),
)


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The epsilon of the norms leaves no trace, and names do not tell whether the head is tied."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    mixer = 'blocks.0.mixer.'
    rows, dims = shapes['token_embed.weight']
    inner, d_state = shapes[f'{mixer}A_log']
    _, _, d_conv = shapes[f'{mixer}conv1d.weight']
    _, rank = shapes[f'{mixer}dt_proj.weight']
    depth = len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})
    expand = inner // dims if inner % dims == 0 else inner / dims
    return _without_defaults(dict(
        mixer='mamba', embed_dims=dims, depth=depth, d_state=d_state, d_conv=d_conv, expand=expand,
        dt_rank='auto' if rank == -(-dims // 16) else rank,
        conv_bias=f'{mixer}conv1d.bias' in shapes, bias=f'{mixer}in_proj.bias' in shapes,
        **_vocabulary(rows)))


def _vocabulary(rows: int) -> dict[str, int]:
    """What an embedding of so many rows is taken to be: the published one, or one token a row."""
    if rows == padded_vocab_size(dict(vocab_size=_TOKENS)):
        return dict(vocab_size=_TOKENS)
    multiple = DEFAULTS['pad_vocab_size_multiple']
    return dict(vocab_size=rows, pad_vocab_size_multiple=1 if rows % multiple else multiple)


def _without_defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arch.items() if k not in DEFAULTS or v != DEFAULTS[k]}


# --- config.json --------------------------------------------------------------------------------

#: Keys of mamba_ssm's ``ssm_cfg``, and of transformers' config, by ours.
_MAMBA_SSM = dict(d_state='d_state', d_conv='d_conv', expand='expand', dt_rank='dt_rank',
                  conv_bias='conv_bias', bias='bias')
_TRANSFORMERS = dict(d_state='state_size', d_conv='conv_kernel', expand='expand',
                     conv_bias='use_conv_bias', bias='use_bias', norm_eps='layer_norm_epsilon',
                     tie_embeddings='tie_word_embeddings')


def arch_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arch that a ``config.json`` of ``mamba_ssm`` or of transformers describes.

    What only matters to training or speed there is passed over. ``residual_in_fp32`` is too: the
    residual stream is fp32 here, whatever the weights are.

    Raises:
        ValueError: on what has no counterpart here, and would give other results.
        KeyError: if a size is missing.
    """
    # Published configs of transformers have keys of mamba_ssm as well.
    kind = config.get('model_type')
    if kind == 'mamba':
        return _without_defaults(_arch_of_transformers(config))
    if kind is None and 'd_model' in config:
        return _without_defaults(_arch_of_mamba_ssm(config))
    raise ValueError(f"it describes a model of another kind ({kind or 'no model_type'}); what is "
                     "read here has model_type 'mamba' (of transformers), or d_model (of "
                     'mamba_ssm)')


def _arch_of_mamba_ssm(config):
    options = config.get('ssm_cfg') or {}
    for key, found, wanted in (
            ('ssm_cfg.layer', options.get('layer', 'Mamba1'), 'Mamba1'),
            ('attn_layer_idx', list(config.get('attn_layer_idx') or ()), []),
            ('d_intermediate', config.get('d_intermediate', 0), 0),
            ('rms_norm', config.get('rms_norm', True), True)):
        _require(key, found, wanted)
    return dict(mixer='mamba', embed_dims=config['d_model'], depth=config['n_layer'],
                vocab_size=config['vocab_size'],
                pad_vocab_size_multiple=config.get('pad_vocab_size_multiple', 8),
                tie_embeddings=config.get('tie_embeddings', True), **_renamed(options, _MAMBA_SSM))


def _arch_of_transformers(config):
    _require('hidden_act', config.get('hidden_act', 'silu'), 'silu')
    dims, rank = config['hidden_size'], config.get('time_step_rank', 'auto')
    return dict(mixer='mamba', embed_dims=dims, depth=config['num_hidden_layers'],
                dt_rank='auto' if rank == -(-dims // 16) else rank,
                **_vocabulary(config['vocab_size']), **_renamed(config, _TRANSFORMERS))


def _renamed(config, names):
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _require(key, found, wanted):
    if found != wanted:
        raise ValueError(f'{key} is {found!r}, which has no counterpart here, only {wanted!r}')


FAMILY = Family(
    name='mamba_lm', model='CausalLM', takes='tokens', weights_key='', archs=ARCHS,
    rules=RULES, check=_check, keys=KEYS,
    signature=('token_embed.weight', 'norm.weight', *(f'blocks.0.{name}' for name in (
        'norm.weight', 'mixer.in_proj.weight', 'mixer.conv1d.weight', 'mixer.x_proj.weight',
        'mixer.dt_proj.weight', 'mixer.dt_proj.bias', 'mixer.A_log', 'mixer.D',
        'mixer.out_proj.weight'))),
    infer_arch=_infer_arch, licence='Apache-2.0', url='https://github.com/state-spaces/mamba')
