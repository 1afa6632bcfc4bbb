"""Video Mamba Suite (arXiv 2403.09626): what its two families of models share.

The official numbers are of ViViM, TimeMamba, the block of ActionMamba and the mixers, in one
folder.
"""

from typing import Any

from vmamba_mm.families.parity import Build, Call, Options, Parity, Subject

#: The folder of configs and of numbers.
SYSTEM = 'video_mamba_suite'
LICENCE = 'MIT'
URL = 'https://github.com/OpenGVLab/video-mamba-suite'

#: Official options of models that all of ours have in common, or that change no number in fp32.
_AS_PUBLISHED = dict(rms_norm=True, norm_epsilon=1e-5, if_abs_pos_embed=True, if_rope=False,
                     if_rope_residual=False, if_bimamba=False, bimamba_type='v2',
                     if_bidirectional=False, if_cls_token=True, use_middle_cls_token=True,
                     use_double_cls_token=False, flip_img_sequences_ratio=-1.0,
                     is_tanh_gating=True, ln_pre=True, use_flash_attn=True)
_WITHOUT_EFFECT = ('residual_in_fp32', 'fused_add_norm', 'drop_rate', 'drop_path_rate',
                   'attn_drop_rate', 'init_layer_scale', 'qkv_bias', 'time_init', 'ft_seq_len',
                   'pt_hw_seq_len')


def _subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    for key, value in _AS_PUBLISHED.items():
        kwargs.require(key, value)
    kwargs.ignore(*_WITHOUT_EFFECT)
    if 'n_embd' in kwargs:
        return _action_mamba_block(kwargs)
    if 'attention_style' in kwargs:
        # Any number of frames goes in; the official code only checks that it is not more.
        kwargs.ignore('num_frames')
        backbone = Build('vmamba_mm.models:TimeMamba', dict(
            arch=_timemamba_arch(kwargs), in_channels=kwargs.get('in_chans', 3),
            out_type='cls_token'))
    else:
        backbone = Build('vmamba_mm.models:ViViM', dict(
            arch=_vivim_arch(kwargs, 'scan_norm' in file), in_channels=kwargs.get('channels', 3),
            out_type='cls_token'))
    output_dims, num_classes = kwargs.get('output_dim'), kwargs.get('num_classes', 0)
    if output_dims is not None:
        kwargs.ignore('num_classes')  # the head is deleted
        return Subject(Build('vmamba_mm.heads:ClipTower', dict(
            backbone=backbone, output_dims=output_dims)))
    return Subject(Build('vmamba_mm.testing:Classifier', dict(
        backbone=backbone, num_classes=num_classes)))


def _image_size(kwargs: Options) -> int | tuple[int, int]:
    size = kwargs.get('img_size', 224)
    return size if isinstance(size, int) or size[0] != size[1] else size[0]


def _vivim_arch(kwargs: Options, has_scan_norm: bool) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VisionMamba`` and ``ViViM``.

    Which mixers have a norm, the module says that the class is imported from; here the file's name.
    """
    kwargs.require('stride', kwargs['patch_size'])
    # Of tokens, it has no effect where there is a class token; 'max' is of the classes.
    kwargs.require('final_pool_type', 'none', 'mean', 'all')
    ssm = kwargs.get('ssm_cfg') or {}
    decomposed = kwargs.get('use_new_mamba', False)
    mixer = 'decomposed' if decomposed else 'scan_norm' if has_scan_norm else 'bidirectional'
    divide = kwargs.get('if_devide_out', False)
    if has_scan_norm:
        kwargs.require('if_devide_out', True)  # or the norm is there and has no effect
    arch = dict(
        embed_dims=kwargs['embed_dim'], depth=kwargs['depth'], d_state=ssm.get('d_state', 16),
        expand=ssm.get('expand', 2), mixer=mixer,
        cls_token='frame' if kwargs.get('frame_mid_cls_token', True) else 'clip',
        patch_size=kwargs['patch_size'], image_size=_image_size(kwargs),
        num_frames=kwargs['num_frames'])
    for key in ('d_conv', 'dt_rank'):
        if key in ssm:
            arch[key] = ssm[key]
    if not divide and mixer == 'bidirectional':
        arch['reduce'] = 'sum'
    return arch


def _timemamba_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``TimeMamba``."""
    return dict(
        embed_dims=kwargs['embed_dim'], depth=kwargs['depth'], num_heads=kwargs['num_heads'],
        mlp_ratio=kwargs['mlp_ratio'], d_state=16, expand=1, patch_size=kwargs['patch_size'],
        image_size=_image_size(kwargs), style=kwargs['attention_style'])


def _same(weights):
    """Names of layers are the official ones."""
    return weights


def _action_mamba_block(kwargs: Options) -> Subject:
    """The official ``MaskMambaBlock``: pooled features and their mask."""
    return Subject(
        Build('vmamba_mm.models:MaskMambaBlock', dict(
            embed_dims=kwargs['n_embd'], stride=kwargs.get('n_ds_stride', 1),
            mixer=kwargs.get('use_mamba_type', 'dbm'), d_conv=kwargs.get('kernel_size', 4),
            drop_path=kwargs.get('drop_path_rate', 0.3))),
        Call(args=('input', 'mask'), outputs=('output', 'output_mask')), convert=_same)


_MIXERS = {'dbm': 'DecomposedBiMambaMixer', 'vim': 'BiMambaMixer', 'vim_scan_norm': 'BiMambaMixer'}


def _mixer(section: str, case: Options) -> Subject:
    kwargs, kind = case['kwargs'], case['kind']
    arguments = dict(embed_dims=kwargs['d_model'])
    for key in ('d_state', 'd_conv', 'expand', 'dt_rank', 'conv_bias', 'bias'):
        if key in kwargs:
            arguments[key] = kwargs[key]
    kwargs.require('bimamba_type', 'v2')
    kwargs.ignore('init_layer_scale', 'layer_idx', 'use_fast_path')
    divide = kwargs.get('if_devide_out', False)
    if kind == 'vim_scan_norm':
        kwargs.require('if_devide_out', True)  # or the norm is there and has no effect
        arguments['out_norm'] = True
    elif kind == 'vim':
        arguments['reduce'] = 'mean' if divide else 'sum'
    return Subject(Build(f'vmamba_mm.layers:{_MIXERS[kind]}', arguments), state='state_dict')


PARITY = Parity(subject=_subject, ops={'op_blocks.pt': _mixer})
