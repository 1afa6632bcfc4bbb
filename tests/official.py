"""Checkpoints in the official formats with random weights, and what is needed to check them.

The names are written out here a second time, from the released files, so that the tests do not
trust the table that they test.
"""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from vmamba_mm.models import VMamba

S1 = dict(embed_dims=8, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv', scan='cross')
S2 = dict(S1, ssm_ratio=2.0)
VANILLA = dict(S2, d_state=16, conv_bias=True, gate=True, mlp_ratio=0.0, stem='patch',
               downsample='merge')

SHARED = Path(__file__).resolve().parents[2] / 'shared'


def shared(name):
    """The path of a file or folder beside the checkout, which a clone lacks: without it the test is
    skipped."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f'no ../shared/{name} beside the checkout')
    return path


def listed_keys(system, names):
    """{arch: {official name: shape}} of published models, or None where the list is not at hand.

    Args:
        system: of which the list is.
        names: {arch: name of the model in the list}. Blocks after the first may be given once
            there, as ``layers.[1..11].`` or ``layers.1..11.``, or the first one of a stage for all
            that the model has by its ``depths``.
    """
    path = SHARED / f'facts/keys/{system}.json'
    if not path.is_file():
        return None
    listed, models = json.loads(path.read_text()), {}
    for arch, name in names.items():
        depths = listed[name]['config']['depths'] if 'blocks' in listed[name] else None
        models[arch] = {full: tuple(shape) for key, shape in listed[name]['keys'].items()
                        for full in _names_of(key, depths)}
    return models


def _names_of(key, depths):
    """A listed name for each block that it stands for."""
    if depths and (found := re.match(r'layers\.(\d+)\.blocks\.0\.', key)):
        return [key.replace('.blocks.0.', f'.blocks.{i}.', 1)
                for i in range(depths[int(found[1])])]
    if found := re.search(r'\[?(\d+)\.\.(\d+)\]?', key):
        return [key.replace(found[0], str(i)) for i in range(int(found[1]), int(found[2]) + 1)]
    return [key]


# Ours -> official, second generation (2024-02-18 and later) -> first (before).
_STEM = {'patch_embed.conv1': 'patch_embed.0', 'patch_embed.norm1': 'patch_embed.2',
         'patch_embed.conv2': 'patch_embed.5', 'patch_embed.norm2': 'patch_embed.7',
         'patch_embed.proj': 'patch_embed.0', 'patch_embed.norm': 'patch_embed.2'}
_FIRST = {'patch_embed.0': 'patch_embed.proj', 'patch_embed.2': 'patch_embed.norm'}


def official_name(key, generation=2, merge=False):
    """The official name of one of our backbone's parameters in a dense file."""
    module, _, leaf = key.rpartition('.')
    if module in _STEM:
        module = _STEM[module]
        return f'{_FIRST.get(module, module) if generation == 1 else module}.{leaf}'
    if re.fullmatch(r'norm\d', module):
        return f'out{key}'
    key = key.replace('stages.', 'layers.', 1)
    if 'downsample' in key:
        if merge:
            return key
        return key.replace('downsample.conv', 'downsample.1').replace('downsample.norm',
                                                                      'downsample.3')
    block, ssm = ('ln_1', 'self_attention') if generation == 1 else ('norm', 'op')
    return key.replace('.norm1.', f'.{block}.').replace('.ssm.', f'.{ssm}.')


def dense_state(model, generation=2, linear_4d=False, prefix='backbone.'):
    """A backbone's state dict as an official detection or segmentation file has it."""
    merge = model.arch['downsample'] == 'merge'
    state = {}
    for key, value in model.state_dict().items():
        if linear_4d and re.search(r'(in_proj|out_proj|fc\d|reduction)\.weight$', key):
            value = value[:, :, None, None]
        state[prefix + official_name(key, generation, merge)] = value
    return state


def classifier_state(model, num_classes=1000, generation=2, linear_4d=False):
    """An official classifier's state dict around a backbone with out_indices=(3,)."""
    state = dense_state(model, generation, linear_4d, prefix='')
    norm, head = ('norm', 'head') if generation == 1 else ('classifier.norm', 'classifier.head')
    for leaf in ('weight', 'bias'):
        state[f'{norm}.{leaf}'] = state.pop(f'outnorm3.{leaf}')
    state[f'{head}.weight'] = torch.randn(num_classes, model.num_features[-1]) * 0.02
    state[f'{head}.bias'] = torch.randn(num_classes) * 0.02
    return state


def random_backbone(arch, out_indices=(0, 1, 2, 3), seed=0):
    """A backbone whose every parameter is random, those that start as ones and zeros as well."""
    torch.manual_seed(seed)
    model = VMamba(arch, out_indices=out_indices).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


class _CfgNode(dict):
    """Pickles as yacs' class, which is not installed."""


def save_training_file(path, model, model_ema=None):
    """A classification file as the official training writes it, with its pickled config."""
    yacs = types.ModuleType('yacs.config')
    _CfgNode.__module__, _CfgNode.__qualname__, _CfgNode.__name__ = (
        'yacs.config', 'CfgNode', 'CfgNode')
    yacs.CfgNode = _CfgNode
    config = _CfgNode(MODEL=_CfgNode(TYPE='vssm', DEPTHS=[2, 2, 8, 2]), EPOCHS=300)
    config.__dict__.update(__immutable__=True, __deprecated_keys__=set())
    content = dict(model=model, optimizer=dict(state={}, param_groups=[]), max_accuracy=82.5,
                   epoch=264, config=config)
    if model_ema is not None:
        content['model_ema'] = model_ema
    sys.modules['yacs'], sys.modules['yacs.config'] = types.ModuleType('yacs'), yacs
    try:
        torch.save(content, path)
    finally:
        del sys.modules['yacs'], sys.modules['yacs.config']
    return path


class Hostile:
    """Runs a command when a trusting program reads it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os
        return os.system, (self.command,)


def save_hostile(path, state, witness):
    """A checkpoint that is whole but for one object; reading it carelessly creates ``witness``."""
    torch.save(dict(state_dict=state, hook=Hostile(f'touch {witness}')), path)
    return path
