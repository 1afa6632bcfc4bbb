"""Language models of Mamba (arXiv 2312.00752), Mamba-2 (arXiv 2405.21060), RWKV and softmax
attention: the published sizes, and names of weights."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vmamba_mm.families import mamba2, rwkv
from vmamba_mm.families.base import Family, Rows, Rule, is_int, is_number, one_of

#: The tokens of the published models' vocabulary, that of GPT-NeoX with its added tokens.
_TOKENS = 50277
#: What an arch need not say, as published: of every model,
_COMMON = dict(norm='rms', norm_eps=1e-5, max_positions=0, drop_rate=0.0, tie_embeddings=True,
               pad_vocab_size_multiple=8, attn_layers=())
#: and of each mixer. The names are those of its arguments, or belong to one in ``_ARGUMENTS``.
OPTIONS: dict[str, dict[str, Any]] = {
    'mamba': dict(d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True, bias=False),
    'mamba2': dict(d_state=128, d_conv=4, expand=2, head_dim=64, d_ssm=None, n_groups=1,
                   rmsnorm=True, norm_before_gate=False, D_has_hdim=False, dt_limit=(0.0, math.inf),
                   conv_bias=True, bias=False),
    'attention': dict(num_heads=1, num_kv_heads=None, attn_head_dim=None, attn_conv=0,
                      rotary_dims=0, qkv_bias=True, out_bias=True, attn_drop_rate=0.0),
    **rwkv.OPTIONS}
_ARGUMENTS = dict(attn_head_dim='head_dim', attn_conv='d_conv', attn_drop_rate='drop_rate')


def with_defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The arch with all that it need not say."""
    return {**_defaults(arch), **arch}


def mixer_of(arch: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    """The kind of a layer's mixer, and its keyword arguments."""
    kind = 'attention' if layer in arch.get('attn_layers', ()) else arch['mixer']
    if kind in rwkv.OPTIONS:
        return kind, rwkv.mixer_options(arch, layer)
    return kind, {_ARGUMENTS.get(key, key): arch.get(key, value)
                  for key, value in OPTIONS[kind].items()}


def _defaults(arch):
    options = dict(_COMMON) | OPTIONS[arch['mixer']]
    if arch['mixer'] in rwkv.OPTIONS:
        options |= rwkv.DEFAULTS
    return options | OPTIONS['attention'] if arch.get('attn_layers') else options


def _arch(embed_dims: int, depth: int, mixer: str = 'mamba', **more: Any) -> dict[str, Any]:
    return dict(mixer=mixer, vocab_size=_TOKENS, embed_dims=embed_dims, depth=depth, **more)


_OF_MAMBA2 = dict(mixer='mamba2', pad_vocab_size_multiple=16)
#: Of the attention layers of mamba2attn-2.7b.
_ATTENTION = dict(num_heads=30, attn_head_dim=128, attn_conv=4, rotary_dims=64, qkv_bias=False,
                  out_bias=False)
ARCHS = {
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
    **rwkv.ARCHS,
}

_POSITIVE = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_POSITIVE_OR_NONE = Rule(lambda v: v is None or is_int(v, 1), 'None or an int of at least 1',
                         optional=True)
_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False').or_absent()
_RATE = Rule(lambda v: is_number(v, 0) and v < 1, 'a number of at least 0 and below 1',
             optional=True)
RULES = {
    'mixer': one_of(*OPTIONS),
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
    'head_dim': _POSITIVE.or_absent(),
    'd_ssm': _POSITIVE_OR_NONE,
    'n_groups': _POSITIVE.or_absent(),
    'rmsnorm': _BOOL,
    'norm_before_gate': _BOOL,
    'D_has_hdim': _BOOL,
    'dt_limit': Rule(lambda v: _is_range(v), 'two numbers of at least 0, the smaller first',
                     optional=True),
    'attn_layers': Rule(lambda v: isinstance(v, tuple | list) and all(is_int(i, 0) for i in v),
                        'numbers of layers, from 0', optional=True),
    'num_heads': _POSITIVE.or_absent(),
    'num_kv_heads': _POSITIVE_OR_NONE,
    'attn_head_dim': _POSITIVE_OR_NONE,
    'attn_conv': Rule(lambda v: is_int(v, 0) and v != 1, '0 or an int of at least 2',
                      optional=True),
    'rotary_dims': Rule(lambda v: is_int(v, 0) and v % 2 == 0, 'an even int of at least 0',
                        optional=True),
    'qkv_bias': _BOOL,
    'out_bias': _BOOL,
    'attn_drop_rate': _RATE,
    'norm': one_of('rms', 'layer').or_absent(),
    'norm_eps': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'max_positions': Rule(lambda v: is_int(v, 0), 'an int of at least 0', optional=True),
    'drop_rate': _RATE,
    'tie_embeddings': _BOOL,
    'pad_vocab_size_multiple': _POSITIVE.or_absent(),
    **rwkv.RULES,
}


def _is_range(value: Any) -> bool:
    return (isinstance(value, tuple | list) and len(value) == 2
            and all(isinstance(v, int | float) for v in value) and 0 <= value[0] <= value[1])


def _check(arch: Mapping[str, Any]) -> None:
    mixer, options = arch['mixer'], _defaults(arch)
    if mixer in rwkv.OPTIONS:
        rwkv.check(arch)
    of_mixers = {key: kind for kind, keys in OPTIONS.items() for key in keys}
    for key in arch:
        if key in of_mixers and key not in options:
            kinds = ' and '.join(repr(kind) for kind, keys in OPTIONS.items() if key in keys)
            more = ' and attn_layers' if kinds == "'attention'" else ''
            raise ValueError(f'arch[{key!r}] is an option of the mixer {kinds}{more}; the mixer '
                             f'{mixer!r} has {sorted(OPTIONS[mixer])}')
    layers = arch.get('attn_layers', ())
    if len(set(layers)) != len(layers) or any(i >= arch['depth'] for i in layers):
        raise ValueError(f"arch['attn_layers']={layers!r} must be different numbers below the "
                         f"depth, {arch['depth']}")
    if layers and mixer == 'attention':
        raise ValueError("arch['attn_layers'] says which layers have attention in place of the "
                         "mixer; with mixer='attention' all have")
    if 'expand' in options:
        expand = arch.get('expand', options['expand'])
        if int(expand * arch['embed_dims']) == 0:
            raise ValueError(f"arch['expand']={expand!r} leaves the mixer no channel of the "
                             f'{arch["embed_dims"]} of embed_dims; it must be at least '
                             f'1/{arch["embed_dims"]}')


def padded_vocab_size(arch: Mapping[str, Any]) -> int:
    """The rows of the embedding, and the logits of a token."""
    defaults = rwkv.DEFAULTS if arch.get('mixer') in rwkv.OPTIONS else _COMMON
    multiple = arch.get('pad_vocab_size_multiple', defaults['pad_vocab_size_multiple'])
    return -(-arch['vocab_size'] // multiple) * multiple


# --- weights ------------------------------------------------------------------------------------

_KEYS = (
    ('backbone.embedding', 'token_embed'),
    ('backbone.embeddings', 'token_embed'),  # of transformers
    ('backbone.position_embed', 'position_embed'),
    ('backbone.layers.#', 'blocks.#'),
    ('backbone.norm_f', 'norm'),
    ('lm_head', 'lm_head'),
)


def keys(names: Collection[str]) -> Rows:
    """The rows of a model with these names: of an RWKV, or of the other mixers; of none, all."""
    if not names:
        return _KEYS + rwkv.KEYS
    return rwkv.KEYS if rwkv.has_own(names) else _KEYS


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The epsilon of the norms leaves no trace, and names do not tell whether the head is tied; see
    also :func:`_infer_mamba2` and :func:`_infer_attention`."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    rows, dims = shapes['token_embed.weight']
    depth = len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})
    mixers = [{k.removeprefix(place): v for k, v in shapes.items() if k.startswith(place)}
              for place in (f'blocks.{i}.mixer.' for i in range(depth))]
    kinds = ['mamba' if 'x_proj.weight' in mixer else 'mamba2' if 'A_log' in mixer
             else rwkv.kind_of(mixer) or 'attention' for mixer in mixers]
    kind = next((k for k in kinds if k != 'attention'), 'attention')
    arch = dict(mixer=kind, embed_dims=dims, depth=depth,
                norm='layer' if 'norm.bias' in shapes else 'rms')
    if kind in rwkv.OPTIONS:
        place = 'blocks.0.channel_mixer.'
        channel_mixer = {k.removeprefix(place): v for k, v in shapes.items() if k.startswith(place)}
        arch |= dict(vocab_size=rows, **rwkv.infer(dims, mixers[0], channel_mixer, mixers[-1]))
        if len(set(kinds)) > 1:
            raise ValueError('the layers are of several kinds')
    else:
        arch |= _vocabulary(rows)
    if 'position_embed.weight' in shapes:
        arch['max_positions'] = shapes['position_embed.weight'][0]
    if kind != 'attention' and 'attention' in kinds:
        arch['attn_layers'] = tuple(i for i, k in enumerate(kinds) if k == 'attention')
    for kind in sorted(set(kinds) & set(_INFER)):
        arch |= _INFER[kind](dims, mixers[kinds.index(kind)])
    return _without_defaults(arch)


def _infer_mamba(dims: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    inner, d_state = shapes['A_log']
    _, _, d_conv = shapes['conv1d.weight']
    _, rank = shapes['dt_proj.weight']
    return dict(d_state=d_state, d_conv=d_conv, expand=_ratio(inner, dims),
                dt_rank='auto' if rank == -(-dims // 16) else rank,
                conv_bias='conv1d.bias' in shapes, bias='in_proj.bias' in shapes)


def _infer_mamba2(dims: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


def _infer_attention(dims: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


_INFER: dict[str, Callable[[int, Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {
    'mamba': _infer_mamba, 'mamba2': _infer_mamba2, 'attention': _infer_attention}


def _ratio(inner: int, dims: int) -> float:
    return inner // dims if inner % dims == 0 else inner / dims


def _vocabulary(rows: int) -> dict[str, int]:
    """What an embedding of so many rows is taken to be: the published one, or one token a row."""
    for multiple in (8, 16):
        found = dict(vocab_size=_TOKENS, pad_vocab_size_multiple=multiple)
        if rows == padded_vocab_size(found):
            return found
    multiple = _COMMON['pad_vocab_size_multiple']
    return dict(vocab_size=rows, pad_vocab_size_multiple=1 if rows % multiple else multiple)


def _without_defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults(arch)
    return {k: v for k, v in arch.items() if k not in defaults or v != defaults[k]}


# --- config.json --------------------------------------------------------------------------------

#: Keys of mamba_ssm's ``ssm_cfg`` and ``attn_cfg``, and of transformers' configs, by ours.
_MAMBA_SSM = dict(d_state='d_state', d_conv='d_conv', expand='expand', dt_rank='dt_rank',
                  conv_bias='conv_bias', bias='bias')
_MAMBA2_SSM = {ours: theirs for theirs, ours in mamba2.ARGUMENTS.items()
               if ours in OPTIONS['mamba2']}
_ATTN_CFG = dict(num_heads='num_heads', num_kv_heads='num_heads_kv', attn_head_dim='head_dim',
                 attn_conv='d_conv', rotary_dims='rotary_emb_dim', qkv_bias='qkv_proj_bias',
                 out_bias='out_proj_bias')
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
    if kind == 'rwkv':
        return _without_defaults(rwkv.arch_of_config(config))
    if kind in ('mamba', 'mamba2'):
        return _without_defaults((_arch_of_mamba if kind == 'mamba' else _arch_of_mamba2)(config))
    if kind is None and 'd_model' in config:
        return _without_defaults(_arch_of_mamba_ssm(config))
    raise ValueError(f"it describes a model of another kind ({kind or 'no model_type'}); what is "
                     "read here has model_type 'mamba', 'mamba2' or 'rwkv' (of transformers), or "
                     'd_model (of mamba_ssm)')


def _arch_of_mamba_ssm(config):
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


FAMILY = Family(
    name='mamba_lm', model='CausalLM', takes='tokens', weights_key='', archs=ARCHS,
    rules=RULES, check=_check, keys=keys,
    signature=('token_embed.weight', 'norm.weight', 'blocks.0.norm.weight',
               'blocks.0.mixer.out_proj.weight'),
    infer_arch=_infer_arch, parity_folders={'mamba2': mamba2.PARITY, 'rwkv': rwkv.PARITY},
    licence='Apache-2.0', url='https://github.com/state-spaces/mamba')
