"""RetNet (arXiv 2307.08621), of whose language models the authors released no weights.

What :mod:`vmamba_mm.families.mamba_lm` has to know of it: options, names of weights, official
numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import one_of
from vmamba_mm.families.mixers import (
    BOOL,
    NOT_NEGATIVE_OR_NONE,
    POSITIVE,
    POSITIVE_OR_NONE,
    Mixers,
    Shapes,
)
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject

_OPTIONS = dict(retention_heads=1, value_dims=None, retention_form='chunkwise', ffn_dims=None,
                ffn_act='gelu', deepnorm=False, post_norm=False, scale_embedding=False)
_DEFAULTS = dict(norm_eps=1e-6, tie_embeddings=False, pad_vocab_size_multiple=1)
_RULES = {
    'retention_heads': POSITIVE,
    'value_dims': POSITIVE_OR_NONE,
    'retention_form': one_of('chunkwise', 'parallel').or_absent(),
    'ffn_dims': NOT_NEGATIVE_OR_NONE,
    'ffn_act': one_of('gelu', 'silu').or_absent(),
    'deepnorm': BOOL, 'post_norm': BOOL, 'scale_embedding': BOOL}


def _mixer_of(arch: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    options = {**_OPTIONS, **_DEFAULTS, **arch}
    return 'retnet', dict(value_dims=_value_dims(arch), num_heads=options['retention_heads'],
                          norm_eps=options['norm_eps'], form=options['retention_form'])


def _value_dims(arch: Mapping[str, Any]) -> int:
    found = arch.get('value_dims')
    if found is not None:
        return found
    return _default_values(arch['embed_dims'], arch.get('retention_heads', 1))


def _default_values(embed_dims: int, heads: int) -> int:
    """5/3 of the channels, and a multiple of the heads."""
    return 5 * embed_dims // 3 // heads * heads


def _check(arch: Mapping[str, Any]) -> None:
    heads, dims, values = arch.get('retention_heads', 1), arch['embed_dims'], _value_dims(arch)
    if dims % (2 * heads) or values % heads or values < 1:
        raise ValueError(f"arch['retention_heads']={heads} must leave each head an even number of "
                         f'the {dims} channels of embed_dims, and divide the {values} of '
                         'value_dims')
    if arch.get('ffn_dims') == 0 and (arch.get('deepnorm') or arch.get('post_norm')):
        raise ValueError("arch['ffn_dims']=0, no MLP, goes with neither deepnorm nor post_norm")
    if arch.get('norm', 'rms') != 'rms':
        raise ValueError("arch['norm'] of the mixer 'retnet' must be 'rms'")


# --- names of weights ---------------------------------------------------------------------------

#: Of fairseq's files; the tables of positions and decays are computed.
_KEYS = (
    ('decoder.embed_tokens', 'token_embed'), ('decoder.layernorm_embedding', 'embed_norm'),
    ('decoder.retnet_rel_pos', None), ('decoder.layer_norm', 'norm'),
    ('decoder.layers.#.retention_layer_norm', 'blocks.#.norm'),
    ('decoder.layers.#.retention', 'blocks.#.mixer'), ('decoder.layers.#.ffn', 'blocks.#.ffn'),
    ('decoder.layers.#.final_layer_norm', 'blocks.#.ffn_norm'),
    ('decoder.output_projection', 'lm_head'))
_OWN_NAMES = re.compile(r'(?:retention\.|mixer\.)g_proj\.')


def _infer(shapes: Shapes) -> dict[str, Any]:
    """Heads leave no trace, and are taken to have 256 channels as published, or to be one; nor do
    the activation, DeepNorm and the scale of the embedding."""
    rows, dims = shapes['token_embed.weight']
    values, _ = shapes['blocks.0.mixer.v_proj.weight']
    heads = dims // 256 if dims % 256 == 0 and values % (dims // 256) == 0 else 1
    return dict(mixer='retnet', vocab_size=rows, retention_heads=heads,
                value_dims=None if values == _default_values(dims, heads) else values,
                ffn_dims=shapes.get('blocks.0.ffn.fc1.weight', (0,))[0],
                post_norm='norm.weight' not in shapes)


def _untold(arch: Mapping[str, Any]) -> tuple[str, str]:
    return 'retention_heads', ('how many heads a RetNet has; give from_pretrained its '
                               'retention_heads (and ffn_act, deepnorm and scale_embedding, where '
                               'they are not the defaults)')


MIXERS = Mixers(
    options={'retnet': _OPTIONS}, rules=_RULES, mixer_of=_mixer_of, keys=_KEYS, infer=_infer,
    own_names=_OWN_NAMES, defaults=_DEFAULTS, check=_check, untold=_untold)


# --- the official code's numbers ----------------------------------------------------------------

def _model(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    options.ignore('kind')
    kwargs.ignore('recurrent_chunk_size', 'subln')  # which change nothing in a decoder
    build = Build('vmamba_mm.models:CausalLM', dict(
        mixer='retnet', vocab_size=kwargs['vocab_size'], embed_dims=kwargs['decoder_embed_dim'],
        depth=kwargs['decoder_layers'], value_dims=kwargs['decoder_value_embed_dim'],
        retention_heads=kwargs['decoder_retention_heads'],
        ffn_dims=kwargs['decoder_ffn_embed_dim'], retention_form='parallel',
        ffn_act={'gelu': 'gelu', 'swish': 'silu'}[kwargs.get('activation_fn', 'gelu')],
        norm_eps=kwargs.get('layernorm_eps', 1e-6), deepnorm=kwargs.get('deepnorm', False),
        post_norm=not kwargs.get('decoder_normalize_before', True),
        scale_embedding=not kwargs.get('no_scale_embedding', True),
        embed_norm=kwargs.get('layernorm_embedding', False),
        tie_embeddings=kwargs.get('share_decoder_input_output_embed', False)))
    return Subject(build, Call(run='vmamba_mm.testing:run_retnet'))


_OF_RETENTION = ('q', 'k', 'v', 'gamma')


def _retention(section: str, case: Options) -> Subject:
    if case.require('op', 'retention', 'theta_shift') == 'retention':
        return Subject(Build('vmamba_mm.ops:retention'), Call(
            args=(), kwargs={name: name for name in _OF_RETENTION},
            run='vmamba_mm.testing:run_retention'))
    return Subject(Build('vmamba_mm.ops.rotation:rotate_pairs'), Call(
        args=('x', 'angle'), run='vmamba_mm.testing:run_rotation'))


def _layer(section: str, case: Options) -> Subject:
    kwargs = case['kwargs']
    case.require('kind', 'MultiScaleRetention')
    kwargs.ignore('chunk_size')  # that of ours changes no number
    return Subject(
        Build('vmamba_mm.layers:MultiScaleRetention', dict(
            embed_dims=kwargs['embed_dim'], value_dims=kwargs['value_dim'],
            num_heads=kwargs['num_heads'], norm_eps=kwargs['layernorm_eps'], form='parallel')),
        Call(run='vmamba_mm.testing:run_retention_layer'), state='state_dict',
        convert=lambda weights: weights)


_SCALED = ('the authors scale the three forms in three ways, of which the norm undoes all but its '
           'epsilon; ours is scaled as their recurrent form')
_NORM = 'the official norm of a head is computed in fp32, in a layer of fp64 too'
PARITY = Parity(
    subject=_model, ops={'op_retention.pt': _retention, 'msr.pt': _layer},
    absences=(Omission('grads.gamma', 'there the decays are fixed', 'op_retention.pt'),),
    limits=(Limit('output_chunkwise', 1e-4, _SCALED),
            *(Limit(name, 1e-6, _NORM, 'msr.pt') for name in (
                'output', 'output_recurrent', 'grad_input', 'grad_params.*'))))
