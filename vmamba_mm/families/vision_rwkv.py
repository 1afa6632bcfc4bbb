"""Vision-RWKV (arXiv 2403.02308): the published architectures and the names of its weights."""

import math
import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, infer_image_size, is_int, is_number, one_of
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject


def _arch(embed_dims: int, depth: int = 12, image_size: int = 224, **more: Any) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depth=depth, patch_size=16, image_size=image_size, **more)


#: The first with ``bi_wkv``, whose formula says.
_V4 = dict(formula='official')
_V6 = dict(mixer='wkv6', head_dim=64)
_POST_NORM = dict(post_norm=True, layer_scale=1e-5)
#: Table 1, where the large one was made for 192 pixels and is used for 384; and those of the public
#: code with RWKV-6.
ARCHS = {
    'tiny': _arch(192, **_V4),
    'small': _arch(384, **_V4, post_norm=True, layer_scale=1.0),
    'base': _arch(768, **_V4, **_POST_NORM),
    'large': _arch(1024, 24, 192, **_V4, **_POST_NORM, key_norm=True),
    'v6_tiny': _arch(192, **_V6),
    'v6_small': _arch(384, **_V6, **_POST_NORM),
    'v6_base': _arch(768, **_V6, **_POST_NORM),
}
#: Heads of the published adapters' deformable attention, and channels of its values by C.
ADAPTERS = {
    'tiny': dict(deform_num_heads=6, deform_ratio=1.0),
    'small': dict(deform_num_heads=6, deform_ratio=1.0),
    'base': dict(deform_num_heads=12, deform_ratio=0.5),
    'large': dict(deform_num_heads=16, deform_ratio=0.5),
}
#: What the optional keys of an arch are where they are absent.
DEFAULTS = dict(mixer='wkv', formula='paper', head_dim=64, post_norm=False, layer_scale=None,
                key_norm=False, mlp_ratio=4, shift_pixel=1, shift_share=0.25)

_COUNT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False', optional=True)
RULES = {
    'embed_dims': _COUNT,
    'depth': _COUNT,
    'patch_size': _COUNT,
    'image_size': Rule(lambda v: is_int(v, 1) or isinstance(v, tuple | list) and len(v) == 2
                       and all(is_int(side, 1) for side in v),
                       'an int of at least 1, or two: height and width'),
    'mixer': one_of('wkv', 'wkv6').or_absent(),
    'head_dim': _COUNT.or_absent(),
    'formula': one_of('paper', 'official').or_absent(),
    'post_norm': _BOOL,
    'layer_scale': Rule(lambda v: v is None or is_number(v), 'a number or None', optional=True),
    'key_norm': _BOOL,
    'mlp_ratio': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'shift_share': Rule(lambda v: is_number(v, 0) and v <= 0.25, 'a number from 0 to 1/4',
                        optional=True),
    'shift_pixel': Rule(lambda v: is_int(v, 0), 'an int of at least 0', optional=True),
}


def grid_of(arch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches in the image that the position embedding is for."""
    size, patch = arch['image_size'], arch['patch_size']
    rows, columns = (math.ceil(side / patch)
                     for side in ((size, size) if isinstance(size, int) else size))
    return rows, columns


def _check(arch: Mapping[str, Any]) -> None:
    if int(arch.get('mlp_ratio', 4) * arch['embed_dims']) < 1:
        raise ValueError(f"arch['mlp_ratio']={arch['mlp_ratio']!r} leaves no hidden channel of the "
                         f'{arch["embed_dims"]} of embed_dims')
    if arch.get('mixer', 'wkv') == 'wkv6' and arch['embed_dims'] % arch.get('head_dim', 64):
        raise ValueError(f"arch['head_dim']={arch.get('head_dim', 64)} must divide "
                         f"arch['embed_dims']={arch['embed_dims']} with arch['mixer']='wkv6'")
    for key, mixer in (('formula', 'wkv'), ('head_dim', 'wkv6')):
        if key in arch and arch.get('mixer', 'wkv') != mixer:
            raise ValueError(f"arch[{key!r}] is of arch['mixer']={mixer!r} alone")


# --- names of weights -------------------------------------------------------------------------

_OF_ADAPTERS = 'level_embed', 'spm', 'interactions', 'up', 'norm1', 'norm2', 'norm3', 'norm4'


def _keys(names) -> tuple[tuple[str, str | None], ...]:
    """The norm at the end is that of the last block's output; an adapter has others."""
    backbone = (('layers.#', 'blocks.#'), ('patch_embed.projection', 'patch_embed.proj'),
                ('pos_embed', 'pos_embed'))
    if 'level_embed' in names:
        return backbone + tuple((name, name) for name in _OF_ADAPTERS)
    blocks = [int(m[1]) for k in names if (m := re.match(r'(?:layers|blocks)\.(\d+)\.', k))]
    return (*backbone, ('ln1', f'norm{max(blocks, default=0)}'))


_FIRST = 'blocks.0.'


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The formula of the WKV, the share of shifts, the place of norms and the initial value of
    layer_scale leave no trace, nor does which side of an image is longer. They are taken to be as
    published, where layer_scale is in models with norms behind the branches, and 1e-5, or 1 with
    384 channels and no RWKV-6; and 1 in the adapter of tiny, which has norms before them."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, _, _, patch = shapes['patch_embed.proj.weight']
    hidden, _ = shapes[f'{_FIRST}ffn.key.weight']
    depth = len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})
    arch = dict(embed_dims=dims, depth=depth, patch_size=patch,
                image_size=infer_image_size(shapes['pos_embed'][1], patch))
    is_v6 = f'{_FIRST}att.time_faaaa' in shapes
    arch |= dict(_V6, head_dim=shapes[f'{_FIRST}att.time_faaaa'][1]) if is_v6 else _V4
    if f'{_FIRST}gamma1' in shapes:
        is_tiny, is_small = dims == 192 and not is_v6, dims == 384 and not is_v6
        arch |= dict(layer_scale=1.0 if is_tiny or is_small else 1e-5)
        arch |= {} if is_tiny else dict(post_norm=True)
    if f'{_FIRST}att.key_norm.weight' in shapes:
        arch |= dict(key_norm=True)
    if f'{_FIRST}ffn.spatial_mix_k' not in shapes:
        arch |= dict(shift_pixel=0)
    return arch if hidden == 4 * dims else arch | dict(mlp_ratio=hidden / dims)


# --- the official code's numbers ----------------------------------------------------------------

def _parity_arch(kwargs: Options, **more: Any) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VRWKV`` or ``VRWKV6``, with the official
    formula."""
    for key, value in dict(final_norm=True, interpolate_mode='bicubic', with_cls_token=False,
                           output_cls_token=False).items():
        kwargs.require(key, value)
    is_v6 = kwargs['type'] == 'VRWKV6'
    kwargs.require('shift_mode', 'q_shift_multihead' if is_v6 else 'q_shift')
    dims = kwargs.get('embed_dims', 256)
    mixer = _V4
    if is_v6:
        mixer = dict(_V6, head_dim=dims // kwargs['num_heads'])
        kwargs.require('head_size', mixer['head_dim'])
    # What only training has, and initial values.
    kwargs.ignore('with_cp', 'init_mode', 'drop_path_rate', 'drop_after_pos', 'drop_rate')
    size = kwargs.get('img_size', 224)
    return dict(
        mixer, embed_dims=dims, depth=kwargs.get('depth', 12),
        patch_size=kwargs.get('patch_size', 16),
        image_size=size if isinstance(size, int) else tuple(size),
        post_norm=kwargs.get('post_norm', False), layer_scale=kwargs.get('init_values'),
        key_norm=kwargs.get('k_norm' if 'k_norm' in kwargs else 'key_norm', False),
        mlp_ratio=kwargs.get('hidden_rate', 4), shift_pixel=kwargs.get('shift_pixel', 1),
        shift_share=kwargs.get('channel_gamma', 0.25), **more)


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier with the maps of its backbone (of the large one the logits alone), or an
    adapter."""
    kwargs = options['kwargs']
    if kwargs['type'] == 'VRWKV_Adapter':
        return _parity_adapter(options)
    is_large = kwargs['type'] == 'VRWKV_Classification'
    options.require('kind', 'classifier_L' if is_large else 'classifier')
    is_v6 = kwargs.require('type', 'VRWKV', 'VRWKV6', 'VRWKV_Classification') == 'VRWKV6'
    arch = _parity_arch(kwargs)
    depth = arch['depth']
    arguments = dict(num_classes=kwargs.get('num_classes', 1000))
    backbone = dict(in_channels=kwargs.get('in_channels', 3))
    if is_large:
        arguments |= dict(hidden_dims=kwargs.get('hidden_dims', 3072) if depth > 12 else None)
    else:
        backbone |= dict(out_indices=tuple(i % depth for i in kwargs.get('out_indices', [-1])))
        arguments |= dict(with_maps=True)

    def build(**formula):
        return Build('vmamba_mm.models:VisionRWKV', dict(backbone, arch=dict(arch, **formula)))

    return Subject(
        Build('vmamba_mm.testing:Classifier', dict(arguments, backbone=build())),
        Call(view=(lambda logits: [logits]) if is_large else None), load=dict(weights='model'),
        variants={} if is_v6 else {'paper': dict(backbone=build(formula='paper'))})


def _parity_adapter(options: Options) -> Subject:
    options.require('kind', 'adapter')
    kwargs = options['kwargs']
    kwargs.require('use_extra_extractor', True)
    names = ('conv_inplane', 'n_points', 'deform_num_heads', 'cffn_ratio', 'deform_ratio')
    features = {'mmdet': 'last', 'mmseg': 'each'}
    return Subject(
        Build('vmamba_mm.models:VisionRWKVAdapter', dict(
            {name: kwargs[name] for name in names if name in kwargs}, arch=_parity_arch(kwargs),
            interactions=kwargs['interaction_indexes'], features=features[kwargs['code_base']])),
        Call(view=list))


def _parity_op(section: str, case: Options) -> Subject:
    case.require('op', 'bi_wkv')
    return Subject(
        Build('vmamba_mm.ops:bi_wkv'), Call(args=('w', 'u', 'k', 'v'), outputs=('y',)),
        variants={mode: dict(mode=mode) for mode in ('paper', 'official')})


def _parity_op_v6(section: str, case: Options) -> Subject:
    case.require('op', 'bi_wkv6')
    return Subject(
        Build('vmamba_mm.testing:by_heads', dict(function=Build('vmamba_mm.ops:bi_wkv6'),
                                                 heads=case['heads'])),
        Call(args=('r', 'k', 'v', 'w', 'u'), outputs=('y',)))


PARITY = Parity(
    subject=_parity_subject,
    ops={'op_bi_wkv.pt': _parity_op, 'op_bi_wkv6.pt': _parity_op_v6},
    omissions=(
        Omission('grads_exact_of_forward', 'of no code: the official gradients by k and v are not '
                 'those of its result', 'op_bi_wkv.pt'),),
    absences=tuple(
        Omission('grad_params.*', 'stored of a part of the weights, as files of all are large',
                 file) for file in ('*large*', 'adapter_*')),
    limits=(
        Limit('grads.[uk]', 1e-9, 'those of a single token are zero but for the 1e-6 beside its '
              'denominator: rounding counts a million times', 'op_bi_wkv.pt', '* official'),))

FAMILY = Family(
    name='vision_rwkv', model='VisionRWKV', archs=ARCHS, rules=RULES, check=_check, keys=_keys,
    head_dims={'large': 3072}, dense_models={'level_embed': 'VisionRWKVAdapter'},
    head_keys=(('head.fc', 'head.fc'), ('head.0', 'head.layers.pre_logits'),
               ('head.2', 'head.layers.head')),
    place='backbone.',
    signature=(f'{_FIRST}ffn.receptance.weight', *(f'{_FIRST}{name}' for name in (
        'ffn.key.weight', 'ffn.value.weight', 'att.receptance.weight', 'att.output.weight',
        'ln0.weight')), 'patch_embed.proj.weight', 'pos_embed'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, parity=PARITY,
    licence='Apache-2.0', url='https://github.com/OpenGVLab/Vision-RWKV')
