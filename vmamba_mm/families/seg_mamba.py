"""SegMamba (arXiv 2401.13560): its published architecture and the names of its weights.

The names follow the public code, which differs from the paper; :mod:`vmamba_mm.models.seg_mamba`
says where.
"""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, are_ints, is_int
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Size, Subject

STAGES = 4
#: The only one that was published.
ARCHS = {'base': dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 2, 2), d_state=16,
                      num_slices=(64, 32, 16, 8))}

_COUNTS = Rule(lambda v: are_ints(v, 1, STAGES), f'{STAGES} ints of at least 1')
RULES = {
    'embed_dims': _COUNTS, 'depths': _COUNTS,
    'd_state': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'num_slices': Rule(lambda v: v == 'depth' or are_ints(v, 1, STAGES),
                       f"{STAGES} ints of at least 1, or 'depth'"),
}

# --- names of weights -------------------------------------------------------------------------

# The official stages begin with a downsampling, ours end with it: the same layers in the same
# order.
_KEYS = (
    ('downsample_layers.0.0', 'patch_embed.proj'),
    *((f'downsample_layers.{i + 1}.1', f'stages.{i}.downsample.conv') for i in range(STAGES - 1)),
    ('gscs.#', 'stages.#.gsc'),
    ('stages.#.#.norm', 'stages.#.blocks.#.norm'), ('stages.#.#.mamba', 'stages.#.blocks.#.mixer'),
    *((f'mlps.{i}', f'norm{i}') for i in range(STAGES)))

_CONVS = 'conv1', 'conv2', 'conv3'
#: The official encoders count from the volume on, the decoders down to it.
_HEAD_KEYS = (
    *((f'encoder{i + 1}.layer.{conv}.conv', f'decode_head.skips.{i}.{conv}')
      for i in range(STAGES + 1) for conv in _CONVS),
    *(row for i in range(STAGES) for row in (
        (f'decoder{STAGES + 1 - i}.transp_conv.conv', f'decode_head.ups.{i}.up'),
        *((f'decoder{STAGES + 1 - i}.conv_block.{conv}.conv', f'decode_head.ups.{i}.{conv}')
          for conv in _CONVS))),
    *((f'decoder1.layer.{conv}.conv', f'decode_head.last.{conv}') for conv in _CONVS),
    ('out.conv.conv', 'decode_head.conv_seg'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of slices leave no trace. Half a file is told as well, so that a message can say
    what it holds."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    blocks = {tuple(map(int, m.groups())) for k in shapes
              if (m := re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', k))}
    count = 1 + max(stage for stage, _ in blocks)
    if count > STAGES:
        raise ValueError(f'more than {STAGES} stages')
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(count))
    dims = tuple(shapes[f'stages.{i}.gsc.proj.weight'][0] for i in range(count))
    _, d_state = shapes['stages.0.blocks.0.mixer.A_log']
    return dict(embed_dims=dims, depths=depths, d_state=d_state,
                num_slices=ARCHS['base']['num_slices'])


# --- the official code's numbers ----------------------------------------------------------------

def _parity_subject(file: str, options: Options) -> Subject:
    """The whole network, whose width after the deepest stage is the head's."""
    kwargs = options['kwargs']
    kwargs.ignore('drop_path_rate', 'layer_scale_init_value')  # the public code does too
    base = ARCHS['base']
    kwargs.require('norm_name', 'instance')
    kwargs.require('conv_block', True)
    kwargs.require('res_block', True)
    kwargs.require('spatial_dims', 3)
    arch = dict(base, embed_dims=tuple(kwargs.get('feat_size', base['embed_dims'])),
                depths=tuple(kwargs.get('depths', base['depths'])))
    return Subject(Build('vmamba_mm.heads:SegMamba', dict(
        in_channels=kwargs.get('in_chans', 1), out_channels=kwargs.get('out_chans', 13),
        hidden_dims=kwargs.get('hidden_size', 768), arch=arch)))


def _parity_layer(section: str, case: Options) -> Subject:
    """A Mamba block on the map of a stage, or a gated spatial convolution."""
    if case.require('kind', 'gsc') == 'gsc':
        return Subject(Build('vmamba_mm.models.seg_mamba:GatedSpatialConv', dict(
            channels=Size('input', 1))), convert=dict, state='state_dict')
    mixer = Build('vmamba_mm.layers:TriMambaMixer', dict(
        embed_dims=case['dim'], d_state=case['d_state'], d_conv=case['d_conv'],
        expand=case['expand']))
    return Subject(
        Build('vmamba_mm.models.seg_mamba:TriMambaBlock', dict(
            mixer=mixer, dims=case['dim'], num_slices=case['num_slices'])),
        Call(run='vmamba_mm.testing:run_with_order'), convert=_convert_block, state='state_dict')


def _convert_block(state: Mapping[str, Any]) -> dict[str, Any]:
    return {f'mixer.{k.removeprefix("mamba.")}' if k.startswith('mamba.') else k: v
            for k, v in state.items()}


PARITY = Parity(
    subject=_parity_subject, ops={'op_tom_gsc.pt': _parity_layer},
    omissions=(Omission('grad_params.proj*.bias', 'is zero but for rounding, as instance norm '
                        'takes the mean away', 'op_tom_gsc.pt', '* gsc'),),
    models_in='fp64',
    limits=(Limit('output', 5e-5, 'the stored outputs, of fp32, are up to 2.2e-5 off those of fp64',
                  '*.pth'),
            Limit('grad_*', 1e-3, 'the stored gradients, of fp32, are up to 5e-4 off those of fp64',
                  '*.pth')))

_MIXER = tuple(f'stages.0.blocks.0.mixer.{name}' for suffix in ('', '_b', '_s') for name in (
    f'A{suffix}_log', f'D{suffix}', f'conv1d{suffix}.weight', f'x_proj{suffix}.weight',
    f'dt_proj{suffix}.weight'))
FAMILY = Family(
    name='seg_mamba', model='SegMambaEncoder', archs=ARCHS, rules=RULES, keys=_KEYS,
    head_keys=_HEAD_KEYS, task='seg', place='vit.',
    signature=(*_MIXER, 'stages.0.blocks.0.mixer.in_proj.weight',
               'stages.0.blocks.0.mixer.out_proj.weight', 'stages.0.blocks.0.norm.weight',
               'patch_embed.proj.weight',
               *(f'stages.{i}.gsc.proj4.weight' for i in range(STAGES)),
               *(f'stages.{i}.downsample.conv.weight' for i in range(STAGES - 1))),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, weights_key='',
    parity=PARITY, licence='none stated',
    url='https://github.com/ge-xing/SegMamba')
