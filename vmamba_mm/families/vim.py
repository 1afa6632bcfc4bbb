"""Vim (arXiv 2401.09417): the five published architectures and the names of its weights."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rows, Rule, infer_image_size, is_int, is_number, one_of
from vmamba_mm.families.parity import (
    Build,
    Call,
    Limit,
    Omission,
    Options,
    Parity,
    Probe,
    Subject,
)


def _arch(embed_dims: int, **more: Any) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depth=24, d_state=16, patch_size=16, image_size=224,
                cls_token='middle', **more)


#: Table 1; ``stride8`` are fine-tuned on patches that overlap by half.
ARCHS = {
    'tiny': _arch(192), 'small': _arch(384), 'base': _arch(768),
    'tiny_stride8': _arch(192, stride=8), 'small_stride8': _arch(384, stride=8),
}

_COUNT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False', optional=True)
RULES = {
    'embed_dims': _COUNT,
    'depth': _COUNT,
    'd_state': _COUNT,
    'patch_size': _COUNT,
    'image_size': Rule(lambda v: is_int(v, 1) or isinstance(v, tuple | list) and len(v) == 2
                       and all(is_int(side, 1) for side in v),
                       'an int of at least 1, or two: height and width'),
    'cls_token': one_of('middle', 'head', 'double', 'none'),
    'stride': _COUNT.or_absent(),
    'mixer': one_of('bidirectional', 'shared', 'causal').or_absent(),
    'reduce': one_of('mean', 'sum').or_absent(),
    'paired': _BOOL,
    'reverse': _BOOL,
    'norm': one_of('rms', 'ln').or_absent(),
    'rope': one_of('none', 'hidden', 'both').or_absent(),
    'rope_size': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'layer_scale': Rule(is_number, 'a number', optional=True),
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
}


def grid_of(arch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches in the image that the position embedding is for."""
    size, patch = arch['image_size'], arch['patch_size']
    rows, columns = ((side - patch) // arch.get('stride', patch) + 1
                     for side in ((size, size) if isinstance(size, int) else size))
    return rows, columns


def _check(arch: Mapping[str, Any]) -> None:
    size, patch = arch['image_size'], arch['patch_size']
    if min([size] if isinstance(size, int) else size) < patch:
        raise ValueError(f"arch['image_size']={size!r} must be at least arch['patch_size']={patch}")
    if arch.get('stride', patch) > patch:
        raise ValueError(f"arch['stride']={arch['stride']} must be at most "
                         f"arch['patch_size']={patch}")
    if arch.get('paired') and arch['depth'] % 2:
        raise ValueError(f"arch['depth']={arch['depth']} must be even with arch['paired']=True")
    if arch.get('rope', 'none') != 'none' and (arch['embed_dims'] % 4
                                               or arch['cls_token'] == 'double'):
        raise ValueError("arch['rope'] needs an arch['embed_dims'] that is a multiple of 4, and "
                         "another arch['cls_token'] than 'double', got "
                         f'{arch["embed_dims"]} and {arch["cls_token"]!r}')
    if arch.get('layer_scale') is not None and arch.get('expand', 2) * arch['embed_dims'] < 1:
        raise ValueError(f"arch['expand']={arch['expand']!r} leaves no channel")


# --- names of weights -------------------------------------------------------------------------

_MIXER = ('A_log', 'D', 'conv1d.weight', 'x_proj.weight', 'dt_proj.weight', 'dt_proj.bias',
          'in_proj.weight', 'out_proj.weight')


def _keys(names: Collection[str]) -> Rows:
    """The norm at the end is that of the last block's output."""
    blocks = [int(m[1]) for k in names if (m := re.match(r'(?:layers|blocks)\.(\d+)\.', k))]
    return (
        ('layers.#', 'blocks.#'), ('patch_embed.proj', 'patch_embed.proj'),
        ('pos_embed', 'pos_embed'), ('cls_token', 'cls_token'),
        ('cls_token_head', 'cls_token_head'), ('cls_token_tail', 'cls_token_tail'),
        ('norm_f', f'norm{max(blocks, default=0)}'), ('rope', None))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The place of a single class token, rotations, the order and the sum of the directions leave
    no trace; nor do which side of an image is longer, how far patches are apart and the initial
    value of ``layer_scale``."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    first = 'blocks.0.mixer.'
    dims, _, _, patch = shapes['patch_embed.proj.weight']
    cls_token = ('double' if 'cls_token_head' in shapes
                 else 'middle' if 'cls_token' in shapes else 'none')
    num_patches = shapes['pos_embed'][1] - {'double': 2, 'middle': 1, 'none': 0}[cls_token]
    inner, d_state = shapes[f'{first}A_log']
    _, rank = shapes[f'{first}dt_proj.weight']
    arch = dict(
        embed_dims=dims,
        depth=len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))}),
        d_state=d_state, patch_size=patch, image_size=infer_image_size(num_patches, patch),
        cls_token=cls_token)
    if (patch, num_patches) == (16, 27 ** 2):  # the published stride 8 at 224 pixels
        arch |= dict(image_size=224, stride=8)
    mixer = ('bidirectional' if f'{first}D_b' in shapes
             else 'shared' if f'{first}A_b_log' in shapes else 'causal')
    unusual = dict(mixer=mixer, norm='ln' if 'blocks.0.norm.bias' in shapes else 'rms',
                   layer_scale=0.1 if f'{first}gamma' in shapes else None,
                   d_conv=shapes[f'{first}conv1d.weight'][-1], expand=inner / dims,
                   dt_rank='auto' if rank == -(-dims // 16) else rank)
    usual = dict(mixer='bidirectional', norm='rms', layer_scale=None, d_conv=4, expand=2,
                 dt_rank='auto')
    return arch | {k: v for k, v in unusual.items() if v != usual[k]}


# --- the official code's numbers ----------------------------------------------------------------

_SSM_KEYS = ('d_conv', 'expand', 'dt_rank')
_MIXERS = {'v2': 'bidirectional', 'v1': 'shared', 'none': 'causal'}
_LAST = {'none': 'mixer', 'add': 'stream', 'add & norm': 'normed'}


def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VisionMamba``, of images, det or seg."""
    for key, value in dict(norm_epsilon=1e-5, if_abs_pos_embed=True).items():
        kwargs.require(key, value)
    # Of one function in fp32; what only training has; and what has no effect.
    kwargs.ignore('residual_in_fp32', 'fused_add_norm', 'drop_rate', 'drop_path_rate',
                  'ft_seq_len', 'use_checkpoint', 'if_devide_out')
    size, patch = kwargs.get('img_size', 224), kwargs.get('patch_size', 16)
    cls_token = 'none'
    for key, kind in (('use_middle_cls_token', 'middle'), ('use_double_cls_token', 'double')):
        if kwargs.get(key, key == 'use_middle_cls_token'):
            cls_token = kind
    if cls_token == 'none':
        cls_token = 'head'
    mixer = 'v1' if kwargs.get('if_bimamba', False) else 'v2'
    mixer = (kwargs.require('bimamba_type', *_MIXERS) or 'v2') if mixer == 'v2' else mixer
    kwargs.ignore('bimamba_type')
    divides = kwargs.get('if_divide_out', True)
    arch = dict(
        embed_dims=kwargs.get('embed_dim', 192), depth=kwargs.get('depth', 24),
        d_state=kwargs.get('d_state', 16), patch_size=patch, stride=kwargs.get('stride', patch),
        image_size=size if isinstance(size, int) else tuple(size),
        cls_token=cls_token if kwargs.get('if_cls_token', True) else 'none',
        mixer=_MIXERS[mixer], reduce='mean' if divides else 'sum',
        norm='rms' if kwargs.get('rms_norm', True) else 'ln',
        paired=kwargs.get('if_bidirectional', False),
        reverse=kwargs.get('flip_img_sequences_ratio', -1.0) >= 1,
        rope='none', rope_size=kwargs.get('pt_hw_seq_len', 14))
    rotates_residual = kwargs.get('if_rope_residual', False)
    if kwargs.get('if_rope', False):
        arch['rope'] = 'both' if rotates_residual else 'hidden'
    if (scale := kwargs.get('init_layer_scale')) is not None:
        arch['layer_scale'] = scale
    ssm = kwargs.get('ssm_cfg') or {}
    return arch | {key: ssm[key] for key in _SSM_KEYS if key in ssm}


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, NAME.pth, or by its arguments a backbone for segmentation or detection."""
    kwargs = options['kwargs']
    ratio = kwargs.get('flip_img_sequences_ratio', -1.0)
    if 0 < ratio < 1:
        raise ValueError(f'kwargs.flip_img_sequences_ratio={ratio} is random at evaluation too, '
                         'and has no counterpart here')
    arch = _parity_arch(kwargs)
    backbone = dict(arch=arch, in_channels=kwargs.get('channels', 3))
    if 'out_indices' in kwargs:
        return _parity_segmentor(kwargs, backbone)
    if 'last_layer_process' in kwargs or 'out_channels' in options:
        return _parity_detector(kwargs, options, backbone)
    pool = kwargs.require('final_pool_type', 'none', 'mean', 'max', 'all') or 'none'
    backbone['out_type'] = 'raw' if arch['cls_token'] == 'none' else 'cls_token'
    classifier = Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:Vim', backbone),
        num_classes=kwargs.get('num_classes', 1000), pool='last' if pool == 'none' else pool))
    return Subject(classifier, Call(probes={'features': Probe('head.fc', side='input')}),
                   load=dict(weights='model'))


def _dense(kwargs: Options, backbone: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a backbone without the class token, which was only trained with."""
    kwargs.ignore('num_classes', 'final_pool_type', 'use_middle_cls_token', 'in_chans')
    return dict(backbone, arch=dict(backbone['arch'], cls_token='none'))


def _parity_segmentor(kwargs: Options, backbone: dict[str, Any]) -> Subject:
    last = kwargs.require('last_layer_process', *_LAST) or 'none'
    indices, features = tuple(kwargs['out_indices']), 'mixer'
    if kwargs.get('use_residual_as_feature', False):  # else the other option has no effect
        has_last = indices[-1] == backbone['arch']['depth'] - 1
        if has_last and last == 'none':
            raise ValueError("kwargs.last_layer_process='none' with use_residual_as_feature=True "
                             'has no counterpart here')
        features = _LAST[last] if has_last else 'stream'
    arguments = dict(_dense(kwargs, backbone), out_indices=indices, features=features)
    model = Build('vmamba_mm.models:Vim', arguments)
    if not kwargs.get('if_fpn', True):
        return Subject(model, Call(view=list), load=dict(resize='published'),
                       loaded={'pos_embed': 'pos_embed'})
    scales = {16: (4, 2, 1, 0.5), 8: (2, 1, 0.5, 0.25)}[backbone['arch']['patch_size']]
    neck = Build('mmseg.models.necks:Feature2Pyramid', dict(
        embed_dim=backbone['arch']['embed_dims'], rescales=list(scales)))
    return Subject(Build('vmamba_mm.testing:WithNeck', dict(backbone=model, neck=neck)),
                   Call(view=list), convert=_convert_segmentor, within=('state_dict',))


#: What is around the backbone in official segmentors and detectors -> in ours.
_SEG_NECK = {16: {'fpn1': 'upsample_4x', 'fpn2': 'upsample_2x'}, 8: {'fpn1': 'upsample_2x'}}


def _convert_segmentor(state: Mapping[str, Any]) -> dict[str, Any]:
    """``backbone.`` of an official segmentor, with its pyramid, to a backbone and a neck."""
    plain = {k.removeprefix('backbone.'): v for k, v in state.items()}
    parts = _SEG_NECK[16 if any(k.startswith('fpn2.') for k in plain) else 8]
    return _convert_dense(plain, '', parts)


def _convert_detector(state: Mapping[str, Any]) -> dict[str, Any]:
    """``net.`` and ``simfp_#.`` of an official detector's backbone to a backbone and a neck."""
    plain = {k.removeprefix('backbone.'): v for k, v in state.items()}
    return _convert_dense(plain, 'net.', {f'simfp_{i}': f'simfp_{i}' for i in range(2, 6)})


def _convert_dense(state, prefix, parts):
    from vmamba_mm.families.names import rename

    rows = _keys([k.removeprefix(prefix) for k in state])
    converted = {}
    for key, value in state.items():
        top, _, rest = key.partition('.')
        if top in parts:
            converted[f'neck.{parts[top]}.{rest}'] = value
        elif not key.startswith('norm_f'):  # which is not used there
            name = rename(key.removeprefix(prefix), rows)
            converted |= {} if name is None else {f'backbone.{name}': value}
    return converted


def _parity_detector(kwargs: Options, options: Options, backbone: dict[str, Any]) -> Subject:
    last = kwargs.require('last_layer_process', 'none', 'add') or 'none'
    dims, channels = backbone['arch']['embed_dims'], options['out_channels']
    model = Build('vmamba_mm.models:Vim', dict(_dense(kwargs, backbone), features=_LAST[last]))
    neck = Build('vmamba_mm.heads:SimpleFeaturePyramid', dict(
        in_channels=dims, out_channels=channels))
    return Subject(
        Build('vmamba_mm.testing:WithNeck', dict(backbone=model, neck=neck)),
        Call(view=list, probes={'last_feat': Probe('backbone', view=lambda maps: maps[0])}),
        convert=_convert_detector, within=('model',))


def _parity_block(section: str, case: Options) -> Subject:
    """A mixer, with the states of a prefill and of steps where the case has them."""
    kwargs, kind = case['kwargs'], case['kind']
    arguments = {ours: kwargs[theirs] for theirs, ours in dict(
        d_model='embed_dims', d_state='d_state', d_conv='d_conv', expand='expand',
        dt_rank='dt_rank', conv_bias='conv_bias', bias='bias',
        init_layer_scale='layer_scale').items() if theirs in kwargs}
    divides = kwargs.get('if_divide_out', False)
    if kind == 'v2':
        arguments['reduce'] = 'mean' if divides else 'sum'
    layer = {'none': 'MambaMixer', 'v1': 'SharedBiMambaMixer', 'v2': 'BiMambaMixer'}[kind]
    if 'prefill_len' not in case:
        return Subject(Build(f'vmamba_mm.layers:{layer}', arguments), state='state_dict')
    case.ignore('prefill_len')  # an argument of the call
    return Subject(Build(f'vmamba_mm.layers:{layer}', arguments),
                   Call(args=('input', 'prefill_len'), run='vmamba_mm.testing:run_in_parts'),
                   state='state_dict')


def _parity_norm(section: str, case: Options) -> Subject:
    call = Call(args=('x', 'weight', 'bias', 'residual'),
                view=lambda y: list(y) if isinstance(y, tuple) else [y])
    return Subject(Build('vmamba_mm.integrations.dropin.norms:layer_norm_fn', dict(
        is_rms_norm=case['rms'], eps=case['eps'], prenorm=case['prenorm'])), call)


def _parity_scan(section: str, case: Options) -> Subject:
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    return Subject(
        Build('vmamba_mm.integrations.dropin.scan:selective_scan_fn', dict(
            delta_softplus=case['delta_softplus'], return_last_state=True)),
        Call(args=(), kwargs={name: name for name in names}, outputs=('output', 'last_state')))


def _parity_rope(section: str, case: Options) -> Subject:
    side = case['ft_seq_len']
    case.ignore('channels')
    return Subject(Build('vmamba_mm.models.vim:rope', dict(
        grid=(side, side), size=case['pt_seq_len'])), Call())


def _parity_resize(section: str, case: Options) -> Subject:
    size = case['new_size']
    case.ignore('old_size')
    return Subject(
        Build('vmamba_mm.models.vim:resize_pos_embed', dict(
            size=(size, size), places=range(case['extra_tokens']))), Call(args=('pos_embed',)))


_WITHOUT_GRADIENTS = 'op_rope.pt', 'op_interp_pos_embed.pt'
PARITY = Parity(
    subject=_parity_subject,
    ops={'op_mamba_block.pt': _parity_block, 'op_fused_add_norm.pt': _parity_norm,
         'op_selective_scan.pt': _parity_scan, 'op_rope.pt': _parity_rope,
         'op_interp_pos_embed.pt': _parity_resize},
    omissions=(Omission('freqs_*', 'what it does to tokens is compared', 'op_rope.pt'),
               Omission('output_names', 'names of the outputs in their order')),
    absences=(*(Omission('*', 'was recorded without gradients; those of models go through it',
                         file) for file in _WITHOUT_GRADIENTS),
              Omission('grad*', 'of what is loaded, the outputs tell', 'seg_from_cls.pth')),
    limits=(Limit('output', 1e-6, 'stored in fp32', 'op_rope.pt'),
            Limit('output', 1e-5, 'computed in fp32', 'op_interp_pos_embed.pt')))

FAMILY = Family(
    name='vim', model='Vim', archs=ARCHS, rules=RULES, check=_check, keys=_keys,
    head_keys=(('head', 'head.fc'), *((f'fpn{i}', f'fpn{i}') for i in range(1, 5))),
    signature=('blocks.0.mixer.A_log', 'blocks.0.norm.weight',
               *(f'blocks.0.mixer.{name}' for name in _MIXER if name != 'A_log'),
               'patch_embed.proj.weight', 'patch_embed.proj.bias', 'pos_embed'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, parity=PARITY,
    licence='Apache-2.0', url='https://github.com/hustvl/Vim')
