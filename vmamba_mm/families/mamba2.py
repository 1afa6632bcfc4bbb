"""The block of Mamba-2 (arXiv 2405.21060): its official options in ours, and its numbers.

Language models are of :mod:`vmamba_mm.families.mamba_lm`.
"""

import math
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Subject

#: Arguments of the official blocks, ``Mamba2`` and ``Mamba2Simple``, and of ``Mamba2Mixer``.
ARGUMENTS = dict(
    d_model='embed_dims', d_state='d_state', d_conv='d_conv', conv_init='conv_init',
    expand='expand', headdim='head_dim', d_ssm='d_ssm', ngroups='n_groups',
    A_init_range='A_init_range', D_has_hdim='D_has_hdim', rmsnorm='rmsnorm',
    norm_before_gate='norm_before_gate', dt_min='dt_min', dt_max='dt_max',
    dt_init_floor='dt_init_floor', dt_limit='dt_limit',
    learnable_init_states='learnable_init_states', bias='bias', conv_bias='conv_bias')
#: Those that change no number.
WITHOUT_EFFECT = ('chunk_size', 'use_mem_eff_path', 'layer_idx', 'device', 'dtype',
                  'process_group', 'sequence_parallel')
#: Where ``Mamba2Simple`` differs.
SIMPLE_DEFAULTS = dict(d_state=64, head_dim=128)


def mixer_arguments(options: Mapping[str, Any], is_simple: bool = False) -> dict[str, Any]:
    """Those of ``Mamba2Mixer`` for the official ones of ``Mamba2``, or of ``Mamba2Simple``."""
    return (SIMPLE_DEFAULTS if is_simple else {}) | {
        ours: options[theirs] for theirs, ours in ARGUMENTS.items() if theirs in options}


def _same(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names of the layer are the official ones."""
    return weights


def _subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    kwargs.ignore(*WITHOUT_EFFECT)
    kwargs.require('activation', 'swish', 'silu')
    # Only the file's name says which of the two classes it is of, unless an option does.
    is_simple = 'learnable_init_states' in kwargs or file.startswith('simple')
    build = Build('vmamba_mm.layers:Mamba2Mixer', mixer_arguments(kwargs, is_simple))
    return Subject(build, _call, convert=_same)


def _call(case: Options) -> Call:
    if 'prefill_length' in case:
        case.ignore('prefill_length')  # an argument of the call
        return Call(args=('input', 'prefill_length'), run='vmamba_mm.testing:run_mamba2_in_parts')
    return Call(kwargs={'seq_idx': 'seq_idx'})


def _gated_norm(section: str, case: Options) -> Subject:
    options = {key: case[key] for key in ('group_size', 'norm_before_gate', 'eps')}
    return Subject(Build('vmamba_mm.layers.norm:gated_rms_norm', options),
                   Call(args=('x', 'weight'), kwargs={'z': 'z'}, outputs=('y',)))


def _scan(section: str, case: Options) -> Subject:
    case.ignore('chunk_size')
    tensors = ('x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias', 'seq_idx', 'initial_states',
               'cu_seqlens')
    options = dict(dt_softplus=case['dt_softplus'], dt_limit=case.get('dt_limit', (0, math.inf)))
    return Subject(Build('vmamba_mm.ops:ssd', options), Call(
        args=(), kwargs={name: name for name in tensors}, run='vmamba_mm.testing:run_ssd',
        uncast=('A',)))  # it comes from fp32, and so does its gradient go there


PARITY = Parity(
    subject=_subject, ops={'op_gated_rmsnorm.pt': _gated_norm, 'op_ssd.pt': _scan},
    absences=(Omission('gradients', 'tokens are decoded without gradients', 'decode*'),))
