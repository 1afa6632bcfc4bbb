"""RWKV 4 (arXiv 2305.13048), 5 and 6 (arXiv 2404.05892) and 7 (arXiv 2503.14456): mixers of the
language models of :mod:`vmamba_mm.families.mamba_lm`."""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.mixers import (
    ABOVE_0,
    NOT_NEGATIVE_OR_NONE,
    POSITIVE,
    POSITIVE_OR_NONE,
    Mixers,
    Shapes,
    below,
    depth_of,
)
from vmamba_mm.families.parity import Build, Call, Options, Parity, Subject

#: Without ranks, RWKV-7 has those that its trainer derives from the channels.
_OPTIONS: dict[str, dict[str, Any]] = {
    'rwkv4': dict(att_dims=None, ffn_dims=None),
    'rwkv5': dict(head_dim=64, att_dims=None, ffn_dims=None, head_divisor=8),
    'rwkv6': dict(head_dim=64, att_dims=None, ffn_dims=None, head_divisor=8, mix_rank=32,
                  decay_rank=64),
    'rwkv7': dict(head_dim=64, ffn_dims=None, decay_rank=None, rate_rank=None, value_rank=None,
                  gate_rank=None)}
_DEFAULTS = dict(norm='layer', embed_norm=True, tie_embeddings=False, pad_vocab_size_multiple=1)
#: The ranks over the root of the channels, to the nearest multiple of 32.
_RANKS = {'decay_rank': 2.5, 'rate_rank': 2.5, 'value_rank': 1.7, 'gate_rank': 5.0}

_RULES = {
    'head_dim': POSITIVE,
    'att_dims': POSITIVE_OR_NONE,
    'ffn_dims': NOT_NEGATIVE_OR_NONE,
    'head_divisor': ABOVE_0,
    'mix_rank': POSITIVE,
    'decay_rank': POSITIVE_OR_NONE,
    'rate_rank': POSITIVE_OR_NONE,
    'value_rank': POSITIVE_OR_NONE,
    'gate_rank': POSITIVE_OR_NONE,
}


def _default_rank(key: str, dims: int) -> int:
    return max(32, round(_RANKS[key] * dims ** 0.5 / 32) * 32)


def _arch(version: int, depth: int, embed_dims: int, ranks: tuple[int, ...] = ()
          ) -> dict[str, Any]:
    """Published before the trainer had today's ranks, so that RWKV-7 has others."""
    more = {key: rank for key, rank in zip(_RANKS, ranks, strict=bool(ranks))
            if rank != _default_rank(key, embed_dims)}
    return dict(mixer=f'rwkv{version}', vocab_size=50277 if version == 4 else 65536,
                embed_dims=embed_dims, depth=depth, **more)


_ARCHS = {
    'rwkv4-169m': _arch(4, 12, 768),
    'rwkv4-430m': _arch(4, 24, 1024),
    'rwkv4-1.5b': _arch(4, 24, 2048),
    'rwkv4-3b': _arch(4, 32, 2560),
    'rwkv4-7b': _arch(4, 32, 4096),
    'rwkv5-0.4b': _arch(5, 24, 1024),
    'rwkv6-1.6b': _arch(6, 24, 2048),
    'rwkv7-0.1b': _arch(7, 12, 768),
    'rwkv7-0.4b': _arch(7, 24, 1024, (64, 64, 32, 128)),
    'rwkv7-1.5b': _arch(7, 24, 2048, (96, 96, 64, 256)),
    'rwkv7-2.9b': _arch(7, 32, 2560, (96, 96, 64, 320)),
}


def _check(arch: Mapping[str, Any]) -> None:
    options = _OPTIONS[arch['mixer']] | arch
    if not arch.get('embed_norm', True):
        raise ValueError(f"arch['embed_norm'] of the mixer {arch['mixer']!r} must be True")
    if options['ffn_dims'] == 0:
        raise ValueError(f"arch['ffn_dims'] of the mixer {arch['mixer']!r} must be None or an int "
                         'of at least 1')
    if arch['mixer'] == 'rwkv6' and options['decay_rank'] is None:
        raise ValueError("arch['decay_rank'] of the mixer 'rwkv6' must be an int of at least 1")
    dims, head_dim = options.get('att_dims') or arch['embed_dims'], options.get('head_dim')
    if head_dim is not None and dims % head_dim:
        raise ValueError(f"arch['head_dim']={head_dim!r} must divide the {dims} channels of "
                         "att_dims, or else of embed_dims")


def _mixer_of(arch: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    options = {key: arch.get(key, value) for key, value in _OPTIONS[arch['mixer']].items()
               if key != 'ffn_dims'}
    options |= {key: _default_rank(key, arch['embed_dims']) for key, value in options.items()
                if value is None and key in _RANKS}
    return arch['mixer'], options | dict(layer=layer, depth=arch['depth'])


def channel_options(arch: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The keyword arguments of a layer's channel mixing."""
    version = int(arch['mixer'][-1])
    return dict(hidden_dims=arch.get('ffn_dims') or _default_hidden(version, arch['embed_dims']),
                version=version, layer=layer, depth=arch['depth'])


def _default_hidden(version: int, dims: int) -> int:
    return 4 * dims if version in (4, 7) else int(3.5 * dims) // 32 * 32 or 32


# --- weights ------------------------------------------------------------------------------------

_KEYS = (
    ('emb', 'token_embed'),
    ('blocks.0.ln0', 'embed_norm'),
    ('blocks.0.att.v0', None),  # official files may have them; nothing there reads them
    ('blocks.0.att.v1', None),
    ('blocks.0.att.v2', None),
    ('blocks.#.ln1', 'blocks.#.norm'),
    ('blocks.#.ln2', 'blocks.#.ffn_norm'),
    ('blocks.#.att.output', 'blocks.#.mixer.out_proj'),
    ('blocks.#.att', 'blocks.#.mixer'),
    ('blocks.#.ffn', 'blocks.#.ffn'),
    ('ln_out', 'norm'),
    ('head', 'lm_head'),
    # of transformers, which has RWKV-4
    ('rwkv.embeddings', 'token_embed'),
    ('rwkv.blocks.0.pre_ln', 'embed_norm'),
    ('rwkv.blocks.#.ln1', 'blocks.#.norm'),
    ('rwkv.blocks.#.ln2', 'blocks.#.ffn_norm'),
    ('rwkv.blocks.#.attention.output', 'blocks.#.mixer.out_proj'),
    *((f'rwkv.blocks.#.{theirs}.time_mix_{name}', f'blocks.#.{ours}.time_mix_{name[0]}')
      for theirs, ours in (('attention', 'mixer'), ('feed_forward', 'ffn'))
      for name in ('key', 'value', 'receptance')),
    ('rwkv.blocks.#.attention', 'blocks.#.mixer'),
    ('rwkv.blocks.#.feed_forward', 'blocks.#.ffn'),
    ('rwkv.ln_out', 'norm'),
)
_OWN_NAMES = re.compile(
    r'^(?:emb|ln_out|head|rwkv)\.|^blocks\.\d+\.(?:ln[012]|att)\.'
    r'|^blocks\.\d+\.ffn\.(?:receptance|key|value|time_\w+|x_k)'
    r'|^blocks\.\d+\.mixer\.(?:receptance|key|value|gate|ln_x|time_\w+|[xwavgkr]_?\w$)')


def _kind_of(shapes: Shapes) -> str | None:
    """The mixer of a layer, by the names of its weights; None for none of RWKV."""
    if 'r_k' in shapes:
        return 'rwkv7'
    if 'time_maa_x' in shapes:
        return 'rwkv6'
    if 'time_faaaa' in shapes and 'gate.weight' in shapes:
        return 'rwkv5'
    return 'rwkv4' if 'time_first' in shapes and 'time_mix_k' in shapes else None


def _infer(shapes: Shapes) -> dict[str, Any]:
    """The divisor of heads leaves no trace. Versions between the published ones have other
    shapes."""
    mixers = [below(f'blocks.{i}.mixer.', shapes) for i in range(depth_of(shapes))]
    kind, *others = {_kind_of(mixer) for mixer in mixers}
    if kind is None or others:
        raise ValueError('the layers are not all of RWKV 4, or 5.2, 6 or 7')
    version, mixer, last = int(kind[-1]), mixers[0], mixers[-1]
    tokens, dims = shapes['token_embed.weight']
    if 'embed_norm.weight' not in shapes:
        raise KeyError('embed_norm.weight')
    hidden, _ = shapes['blocks.0.ffn.key.weight']
    rows, _ = mixer['key.weight']
    arch = dict(mixer=kind, vocab_size=tokens,
                ffn_dims=None if hidden == _default_hidden(version, dims) else hidden)
    if version < 7:
        arch['att_dims'] = None if rows == dims else rows
    if version == 5 and len(mixer['time_decay']) != 2:
        raise ValueError(f'time_decay is {mixer["time_decay"]}: only RWKV-5.2 is supported')
    if version > 4:
        _, arch['head_dim'] = mixer['r_k' if version == 7 else 'time_faaaa']
    if version == 6:
        arch |= dict(mix_rank=mixer['time_maa_w2'][1], decay_rank=mixer['time_decay_w1'][1])
    if version == 7:
        for key, name in (('decay_rank', 'w1'), ('rate_rank', 'a1'), ('value_rank', 'v1'),
                          ('gate_rank', 'g1')):
            # A model of one layer has no v1.
            rank = last[name][1] if name in last else None
            arch[key] = None if rank == _default_rank(key, dims) else rank
    return arch


def _arch_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers, which has RWKV-4."""
    dims = config['hidden_size']
    return dict(
        mixer='rwkv4', embed_dims=dims, depth=config['num_hidden_layers'],
        vocab_size=config['vocab_size'], norm_eps=config.get('layer_norm_epsilon', 1e-5),
        tie_embeddings=config.get('tie_word_embeddings', False),
        **{ours: None if config.get(theirs) in (None, default) else config[theirs]
           for ours, theirs, default in (('att_dims', 'attention_hidden_size', dims),
                                         ('ffn_dims', 'intermediate_size', 4 * dims))})


MIXERS = Mixers(
    options=_OPTIONS, rules=_RULES, mixer_of=_mixer_of, keys=_KEYS, infer=_infer,
    own_names=_OWN_NAMES, defaults=_DEFAULTS, archs=_ARCHS, check=_check,
    configs={'rwkv': _arch_of_config})


# --- numbers of the official code ---------------------------------------------------------------

def _subject(file: str, options: Options) -> Subject:
    options.ignore('kind')
    kwargs = options['kwargs']
    kwargs.ignore('ctx_len', 'dropout', 'grad_cp', 'my_testing')
    for key, value in (('head_qk', 0), ('pre_ffn', 0), ('my_pos_emb', 0), ('tiny_att_dim', -1),
                       ('tiny_att_layer', -1)):
        kwargs.require(key, value)
    version = kwargs['version']
    arch = dict(mixer=f'rwkv{version}', vocab_size=kwargs['vocab_size'],
                embed_dims=kwargs['n_embd'], depth=kwargs['n_layer'])
    if version == 4:
        kwargs.ignore('head_size_a', 'head_size_divisor')
    else:
        arch['head_dim'] = kwargs['head_size_a']
    if version in (5, 6):
        arch['head_divisor'] = kwargs['head_size_divisor']
    if version == 7:  # there the channel mixing has 4 C, whatever dim_ffn is
        kwargs.ignore('dim_ffn', 'head_size_divisor')
        kwargs.require('dim_att', kwargs['n_embd'])
    else:
        arch |= dict(att_dims=kwargs['dim_att'], ffn_dims=kwargs['dim_ffn'])
    return Subject(Build('vmamba_mm.models:CausalLM', arch), Call(view=lambda logits: [logits]))


def _op(name: str, tensors: str):
    def subject(section: str, case: Options) -> Subject:
        case.ignore('op', 'note')
        heads = case['heads'] if name != 'wkv' else None
        return Subject(
            Build(f'vmamba_mm.ops:{name}'),
            Call(args=(), kwargs={key: key for key in tensors.split()}, outputs=('y',),
                 run=lambda op, inputs: dict(y=_by_heads(op, inputs, heads))))

    return subject


def _by_heads(op: Any, inputs: Mapping[str, Any], heads: int | None) -> Any:
    """The result (B, T, C) of an op that takes (B, T, heads, C / heads)."""
    if heads is None:
        return op(**inputs)
    return op(**{key: t.unflatten(-1, (heads, -1)) if t.dim() == 3 else t
                 for key, t in inputs.items()}).flatten(2)


PARITY = Parity(
    subject=_subject,
    ops={'op_wkv4.pt': _op('wkv', 'w u k v'), 'op_wkv5.pt': _op('wkv5', 'r k v w u'),
         'op_wkv6.pt': _op('wkv6', 'r k v w u'), 'op_wkv7.pt': _op('wkv7', 'r w k v a b')})
