"""Language models of the mixers of Mamba, RWKV and RetNet, of softmax attention, and of layers of
several kinds as of Jamba: what they have in common, and the family of them all."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from vmamba_mm.families import cobra, jamba, mamba2, mamba_ssm, retnet, rwkv
from vmamba_mm.families.base import Family, Rows, Rule, is_int, one_of
from vmamba_mm.families.mixers import ABOVE_0, BOOL, POSITIVE, RATE, Mixers, depth_of

#: The first has the models whose names are not those of any other.
_SYSTEMS = (mamba_ssm.MIXERS, rwkv.MIXERS, retnet.MIXERS, jamba.MIXERS)
OPTIONS: dict[str, Mapping[str, Any]] = {
    mixer: options for system in _SYSTEMS for mixer, options in system.options.items()}
#: What no arch need say, whatever its mixer, as published of Mamba.
_COMMON = dict(norm='rms', norm_eps=1e-5, embed_norm=False, max_positions=0, drop_rate=0.0,
               tie_embeddings=True, pad_vocab_size_multiple=8, attn_layers=())


def mixers_of(arch: Mapping[str, Any]) -> Mixers:
    """The mixers that the arch's is one of."""
    return next(system for system in _SYSTEMS if arch['mixer'] in system.options)


def with_defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The arch with all that it need not say."""
    return {**_defaults(arch), **arch}


def _defaults(arch):
    options = _COMMON | mixers_of(arch).defaults | OPTIONS[arch['mixer']]
    return options | OPTIONS['attention'] if arch.get('attn_layers') else options


def _without_defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults(arch)
    return {k: v for k, v in arch.items() if k not in defaults or v != defaults[k]}


def padded_vocab_size(arch: Mapping[str, Any]) -> int:
    """The rows of the embedding, and the logits of a token."""
    options = with_defaults(arch)
    return mamba_ssm.padded_vocab_size(options['vocab_size'], options['pad_vocab_size_multiple'])


_RULES = {
    'mixer': one_of(*OPTIONS),
    'vocab_size': replace(POSITIVE, optional=False),
    'embed_dims': replace(POSITIVE, optional=False),
    'depth': replace(POSITIVE, optional=False),
    'attn_layers': Rule(lambda v: isinstance(v, tuple | list) and all(is_int(i, 0) for i in v),
                        'numbers of layers, from 0', optional=True),
    'norm': one_of('rms', 'layer').or_absent(),
    'norm_eps': ABOVE_0,
    'embed_norm': BOOL,
    'max_positions': Rule(lambda v: is_int(v, 0), 'an int of at least 0', optional=True),
    'drop_rate': RATE,
    'tie_embeddings': BOOL,
    'pad_vocab_size_multiple': POSITIVE,
    **{key: rule for system in _SYSTEMS for key, rule in system.rules.items()},
}


def _check(arch: Mapping[str, Any]) -> None:
    mixer, layers, options = arch['mixer'], arch.get('attn_layers', ()), _defaults(arch)
    of_mixers = {key for keys in OPTIONS.values() for key in keys}
    for key in arch:
        if key in of_mixers and key not in options:
            kinds = [repr(kind) for kind, keys in OPTIONS.items() if key in keys]
            if "'attention'" in kinds:
                kinds.insert(kinds.index("'attention'") + 1, 'attn_layers')
            raise ValueError(f'arch[{key!r}] is an option of the mixer {" and ".join(kinds)}; '
                             f'the mixer {mixer!r} has {sorted(OPTIONS[mixer])}')
    if len(set(layers)) != len(layers) or any(i >= arch['depth'] for i in layers):
        raise ValueError(f"arch['attn_layers']={layers!r} must be different numbers below the "
                         f"depth, {arch['depth']}")
    if layers and 'attention' not in mixers_of(arch).options:
        raise ValueError("arch['attn_layers'] goes with the mixers 'mamba' and 'mamba2', not with "
                         f'{mixer!r}')
    mixers_of(arch).check(arch)


# --- weights ------------------------------------------------------------------------------------

def _system_of(names: Collection[str]) -> Mixers:
    """The mixers that a model with these names has, official ones or ours."""
    return next((system for system in _SYSTEMS if system.has_own(names)), _SYSTEMS[0])


#: What every model may have, and official ones do not.
_OURS_ALONE = (('position_embed', 'position_embed'), ('embed_norm', 'embed_norm'))


def _keys(names: Collection[str]) -> Rows:
    """The rows of a model with these names; of none, all."""
    systems = [_system_of(names)] if names else _SYSTEMS
    rows = (system.keys(names) if callable(system.keys) else system.keys for system in systems)
    return (*(row for of_system in rows for row in of_system), *_OURS_ALONE)


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The epsilon of the norms leaves no trace, and names do not tell whether the head is tied."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    positions = shapes.get('position_embed.weight', (0,))[0]
    return _without_defaults(dict(
        embed_dims=shapes['token_embed.weight'][1], depth=depth_of(shapes),
        norm='layer' if 'blocks.0.norm.bias' in shapes else 'rms', max_positions=positions,
        embed_norm='embed_norm.weight' in shapes, **_system_of(shapes).infer(shapes)))


# --- config.json --------------------------------------------------------------------------------

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
    readers = {kind: read for system in _SYSTEMS for kind, read in system.configs.items()}
    if kind is None and 'd_model' in config:
        return _without_defaults(mamba_ssm.arch_of_mamba_ssm(config))
    if kind in readers:
        return _without_defaults(readers[kind](config))
    *first, last = map(repr, readers)
    raise ValueError(f"it describes a model of another kind ({kind or 'no model_type'}); what is "
                     f'read here has model_type {", ".join(first)} or {last} (of transformers), or '
                     'd_model (of mamba_ssm)')


FAMILY = Family(
    name='mamba_lm', model='CausalLM', takes='tokens', weights_key='',
    archs={name: arch for system in _SYSTEMS for name, arch in system.archs.items()},
    rules=_RULES, check=_check, keys=_keys,
    signature=('token_embed.weight', 'blocks.0.norm.weight', 'blocks.0.mixer.out_proj.weight'),
    infer_arch=_infer_arch,
    parity_folders={'cobra': cobra.PARITY, 'jamba': jamba.PARITY, 'mamba2': mamba2.PARITY,
                    'retnet': retnet.PARITY, 'rwkv': rwkv.PARITY},
    licence='Apache-2.0', url='https://github.com/state-spaces/mamba')
