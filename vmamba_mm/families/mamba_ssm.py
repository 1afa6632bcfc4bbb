"""Mamba (arXiv 2312.00752), Mamba-2 (arXiv 2405.21060) and softmax attention: mixers of the
language models of :mod:`vmamba_mm.families.mamba_lm`, with the files of ``mamba_ssm`` and
transformers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vmamba_mm.families import mamba2
from vmamba_mm.families.base import Rule, is_int
from vmamba_mm.families.mixers import (
    ABOVE_0,
    BOOL,
    POSITIVE,
    POSITIVE_OR_NONE,
    RATE,
    Mixers,
    Shapes,
    below,
    depth_of,
)

#: The tokens of the published models' vocabulary, that of GPT-NeoX with its added tokens.
_TOKENS = 50277
#: The names are those of the mixers' arguments, or belong to one in ``_ARGUMENTS``.
_OPTIONS: dict[str, dict[str, Any]] = {
    'mamba': dict(d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True, bias=False),
    'mamba2': dict(d_state=128, d_conv=4, expand=2, head_dim=64, d_ssm=None, n_groups=1,
                   rmsnorm=True, norm_before_gate=False, D_has_hdim=False, dt_limit=(0.0, math.inf),
                   conv_bias=True, bias=False),
    'attention': dict(num_heads=1, num_kv_heads=None, attn_head_dim=None, attn_conv=0,
                      rotary_dims=0, qkv_bias=True, out_bias=True, attn_drop_rate=0.0)}
_ARGUMENTS = dict(attn_head_dim='head_dim', attn_conv='d_conv', attn_drop_rate='drop_rate')


def _mixer_of(arch: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    kind = 'attention' if layer in arch.get('attn_layers', ()) else arch['mixer']
    return kind, {_ARGUMENTS.get(key, key): arch.get(key, value)
                  for key, value in _OPTIONS[kind].items()}


def _arch(embed_dims: int, depth: int, mixer: str = 'mamba', **more: Any) -> dict[str, Any]:
    return dict(mixer=mixer, vocab_size=_TOKENS, embed_dims=embed_dims, depth=depth, **more)


_OF_MAMBA2 = dict(mixer='mamba2', pad_vocab_size_multiple=16)
#: Of the attention layers of mamba2attn-2.7b.
_ATTENTION = dict(num_heads=30, attn_head_dim=128, attn_conv=4, rotary_dims=64, qkv_bias=False,
                  out_bias=False)
_ARCHS = {
    'mamba-130m': _arch(768, 24),
    'mamba-370m': _arch(1024, 48),
    'mamba-790m': _arch(1536, 48),
    'mamba-1.4b': _arch(2048, 48),
    'mamba-2.8b': _arch(2560, 64),
    'mamba2-130m': _arch(768, 24, **_OF_MAMBA2),
    'mamba2-370m': _arch(1024, 48, **_OF_MAMBA2),
    'mamba2-780m': _arch(1536, 48, **_OF_MAMBA2),
    'mamba2-1.3b': _arch(2048, 48, **_OF_MAMBA2),
    'mamba2-2.7b': _arch(2560, 64, **_OF_MAMBA2),
    'mamba2attn-2.7b': _arch(2560, 64, **_OF_MAMBA2, attn_layers=(9, 18, 27, 36, 45, 56),
                             **_ATTENTION),
}

_RULES = {
    'd_state': POSITIVE,
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'expand': ABOVE_0,
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
    'conv_bias': BOOL,
    'bias': BOOL,
    'head_dim': POSITIVE,
    'd_ssm': POSITIVE_OR_NONE,
    'n_groups': POSITIVE,
    'rmsnorm': BOOL,
    'norm_before_gate': BOOL,
    'D_has_hdim': BOOL,
    'dt_limit': Rule(lambda v: _is_range(v), 'two numbers of at least 0, the smaller first',
                     optional=True),
    'num_heads': POSITIVE,
    'num_kv_heads': POSITIVE_OR_NONE,
    'attn_head_dim': POSITIVE_OR_NONE,
    'attn_conv': Rule(lambda v: is_int(v, 0) and v != 1, '0 or an int of at least 2',
                      optional=True),
    'rotary_dims': Rule(lambda v: is_int(v, 0) and v % 2 == 0, 'an even int of at least 0',
                        optional=True),
    'qkv_bias': BOOL,
    'out_bias': BOOL,
    'attn_drop_rate': RATE,
}


def _is_range(value: Any) -> bool:
    return (isinstance(value, tuple | list) and len(value) == 2
            and all(isinstance(v, int | float) for v in value) and 0 <= value[0] <= value[1])


def _check(arch: Mapping[str, Any]) -> None:
    if arch['mixer'] == 'attention':
        if arch.get('attn_layers'):
            raise ValueError("arch['attn_layers'] says which layers have attention in place of the "
                             "mixer; with mixer='attention' all have")
        return
    expand = arch.get('expand', _OPTIONS[arch['mixer']]['expand'])
    if int(expand * arch['embed_dims']) == 0:
        raise ValueError(f"arch['expand']={expand!r} leaves the mixer no channel of the "
                         f'{arch["embed_dims"]} of embed_dims; it must be at least '
                         f'1/{arch["embed_dims"]}')


def padded_vocab_size(vocab_size: int, pad_vocab_size_multiple: int) -> int:
    """The rows of an embedding for so many tokens."""
    return -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple


# --- weights ------------------------------------------------------------------------------------

_KEYS = (
    ('backbone.embedding', 'token_embed'),
    ('backbone.embeddings', 'token_embed'),  # of transformers
    ('backbone.position_embed', 'position_embed'),
    ('backbone.embed_norm', 'embed_norm'),
    ('backbone.layers.#', 'blocks.#'),
    ('backbone.norm_f', 'norm'),
    ('lm_head', 'lm_head'),
)


def _infer(shapes: Shapes) -> dict[str, Any]:
    """See also :func:`_infer_mamba2` and :func:`_infer_attention`."""
    rows, dims = shapes['token_embed.weight']
    mixers = [below(f'blocks.{i}.mixer.', shapes) for i in range(depth_of(shapes))]
    kinds = ['mamba' if 'x_proj.weight' in mixer else 'mamba2' if 'A_log' in mixer
             else 'attention' for mixer in mixers]
    kind = next((k for k in kinds if k != 'attention'), 'attention')
    arch = dict(mixer=kind, **_vocabulary(rows))
    if kind != 'attention' and 'attention' in kinds:
        arch['attn_layers'] = tuple(i for i, k in enumerate(kinds) if k == 'attention')
    for kind in sorted(set(kinds)):
        arch |= _INFER[kind](dims, mixers[kinds.index(kind)])
    return arch


def _infer_mamba(dims: int, shapes: Shapes) -> dict[str, Any]:
    inner, d_state = shapes['A_log']
    _, _, d_conv = shapes['conv1d.weight']
    _, rank = shapes['dt_proj.weight']
    return dict(d_state=d_state, d_conv=d_conv, expand=_ratio(inner, dims),
                dt_rank='auto' if rank == -(-dims // 16) else rank,
                conv_bias='conv1d.bias' in shapes, bias='in_proj.bias' in shapes)


def _infer_mamba2(dims: int, shapes: Shapes) -> dict[str, Any]:
    """Only the product of ``n_groups`` and ``d_state`` shows: there is one group, as published.
    The order of norm and gate and the limits of dt leave no trace."""
    (heads,), (rows, _) = shapes['dt_bias'], shapes['in_proj.weight']
    channels, _, d_conv = shapes['conv1d.weight']
    _, inner = shapes['out_proj.weight']
    if (d_state := (rows - heads - 2 * inner) // 2) < 1:
        raise ValueError(f'in_proj.weight has {rows} rows, which are too few')
    d_ssm = channels - 2 * d_state
    return dict(d_state=d_state, d_conv=d_conv, expand=_ratio(inner, dims),
                head_dim=d_ssm // heads, d_ssm=None if d_ssm == inner else d_ssm,
                rmsnorm='norm.weight' in shapes, D_has_hdim=shapes['D'] != (heads,),
                conv_bias='conv1d.bias' in shapes, bias='in_proj.bias' in shapes)


def _infer_attention(dims: int, shapes: Shapes) -> dict[str, Any]:
    """The number of heads and the rotation leave no trace. They are as published where there is a
    convolution, and else there is one head of keys and values, and no rotation."""
    (rows, _), (_, inner) = shapes['in_proj.weight'], shapes['out_proj.weight']
    of_keys, odd = divmod(rows - inner, 2)
    if odd or of_keys < 1 or inner % of_keys:
        raise ValueError(f'in_proj.weight has {rows} rows and out_proj.weight {inner} columns')
    arch = dict(attn_conv=shapes['conv1d.weight'][2] if 'conv1d.weight' in shapes else 0,
                qkv_bias='in_proj.bias' in shapes, out_bias='out_proj.bias' in shapes)
    width = _ATTENTION['attn_head_dim']
    is_published = arch['attn_conv'] and of_keys % width == 0
    width, rotary_dims = (width, _ATTENTION['rotary_dims']) if is_published else (of_keys, 0)
    heads = inner // width
    return arch | dict(num_heads=heads, rotary_dims=rotary_dims,
                       num_kv_heads=None if of_keys == inner else of_keys // width,
                       attn_head_dim=None if width * heads == dims else width)


_INFER: dict[str, Callable[[int, Shapes], dict[str, Any]]] = {
    'mamba': _infer_mamba, 'mamba2': _infer_mamba2, 'attention': _infer_attention}


def _ratio(inner: int, dims: int) -> float:
    return inner // dims if inner % dims == 0 else inner / dims


def _vocabulary(rows: int) -> dict[str, int]:
    """What an embedding of so many rows is taken to be: the published one, or one token a row."""
    for multiple in (8, 16):
        found = dict(vocab_size=_TOKENS, pad_vocab_size_multiple=multiple)
        if rows == padded_vocab_size(**found):
            return found
    return dict(vocab_size=rows, pad_vocab_size_multiple=1 if rows % 8 else 8)


def _untold(arch: Mapping[str, Any]) -> tuple[str, str]:
    if arch['mixer'] != 'attention' and not arch.get('attn_layers'):
        return '', ''
    return 'num_heads', ('how many heads the attention has; give from_pretrained its num_heads '
                         '(and rotary_dims, if there are any), or the folder with config.json')


# --- config.json --------------------------------------------------------------------------------

#: Keys of mamba_ssm's ``ssm_cfg`` and ``attn_cfg``, and of transformers' configs, by ours.
_MAMBA_SSM = dict(d_state='d_state', d_conv='d_conv', expand='expand', dt_rank='dt_rank',
                  conv_bias='conv_bias', bias='bias')
_MAMBA2_SSM = {ours: theirs for theirs, ours in mamba2.ARGUMENTS.items()
               if ours in _OPTIONS['mamba2']}
_ATTN_CFG = dict(num_heads='num_heads', num_kv_heads='num_heads_kv', attn_head_dim='head_dim',
                 attn_conv='d_conv', rotary_dims='rotary_emb_dim', qkv_bias='qkv_proj_bias',
                 out_bias='out_proj_bias')
_TRANSFORMERS = dict(d_state='state_size', d_conv='conv_kernel', expand='expand',
                     conv_bias='use_conv_bias', bias='use_bias', norm_eps='layer_norm_epsilon',
                     tie_embeddings='tie_word_embeddings')


def arch_of_mamba_ssm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arch that a ``config.json`` of ``mamba_ssm`` describes. Raises as one of
    :attr:`Mixers.configs`."""
    options = config.get('ssm_cfg') or {}
    layers, attention = config.get('attn_layer_idx') or (), config.get('attn_cfg') or {}
    _require('ssm_cfg.layer', layer := options.get('layer', 'Mamba1'), 'Mamba1', 'Mamba2')
    _require('d_intermediate', config.get('d_intermediate', 0), 0)
    arch = dict(mixer='mamba' if layer == 'Mamba1' else 'mamba2', embed_dims=config['d_model'],
                depth=config['n_layer'], vocab_size=config['vocab_size'],
                norm='rms' if config.get('rms_norm', True) else 'layer',
                pad_vocab_size_multiple=config.get('pad_vocab_size_multiple', 8),
                tie_embeddings=config.get('tie_embeddings', True),
                **_renamed(options, _MAMBA_SSM if layer == 'Mamba1' else _MAMBA2_SSM))
    if layers:
        for key, default, *wanted in (('causal', False, True), ('mlp_dim', 0, 0),
                                      ('rotary_emb_base', 10000.0, 10000),
                                      ('rotary_emb_interleaved', False, False),
                                      ('softmax_scale', None, None)):
            _require(f'attn_cfg.{key}', attention.get(key, default), *wanted)
        arch |= dict(attn_layers=tuple(layers), num_heads=attention['num_heads'])
        arch |= _renamed(attention, _ATTN_CFG)
    return arch


def _arch_of_mamba(config):
    _require('hidden_act', config.get('hidden_act', 'silu'), 'silu')
    dims, rank = config['hidden_size'], config.get('time_step_rank', 'auto')
    return dict(mixer='mamba', embed_dims=dims, depth=config['num_hidden_layers'],
                dt_rank='auto' if rank == -(-dims // 16) else rank,
                **_vocabulary(config['vocab_size']), **_renamed(config, _TRANSFORMERS))


def _arch_of_mamba2(config):
    _require('hidden_act', config.get('hidden_act', 'silu'), 'silu')
    _require('rms_norm', config.get('rms_norm', True), True)
    arch = dict(mixer='mamba2', embed_dims=config['hidden_size'],
                depth=config['num_hidden_layers'], head_dim=config.get('head_dim', 64),
                n_groups=config.get('n_groups', 8), tie_embeddings=False)
    arch |= _vocabulary(config['vocab_size']) | _renamed(config, _TRANSFORMERS)
    inner = int(arch.get('expand', 2) * arch['embed_dims'])
    _require('num_heads', config.get('num_heads', 128), inner / arch['head_dim'])
    # JSON has no infinity: newer versions write a dict.
    arch['dt_limit'] = tuple(float(v['__float__'] if isinstance(v, Mapping) else v)
                             for v in config.get('time_step_limit', (0, math.inf)))
    return arch


def _renamed(config, names):
    return {ours: tuple(config[theirs]) if isinstance(config[theirs], list) else config[theirs]
            for ours, theirs in names.items() if theirs in config}


def _require(key, found, *wanted):
    if found not in wanted:
        raise ValueError(f'{key} is {found!r}, which has no counterpart here, only '
                         f'{" and ".join(map(repr, wanted))}')


MIXERS = Mixers(
    options=_OPTIONS, rules=_RULES, mixer_of=_mixer_of, keys=_KEYS, infer=_infer, archs=_ARCHS,
    check=_check, untold=_untold, configs={'mamba': _arch_of_mamba, 'mamba2': _arch_of_mamba2})
