"""VideoMamba (arXiv 2403.06977): the published architectures and the names of its weights."""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, infer_image_size, is_int, is_number, one_of
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


def _arch(embed_dims: int, depth: int, *, image_size: int = 224, num_frames: int = 0
          ) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depth=depth, d_state=16, patch_size=16,
                image_size=image_size, num_frames=num_frames, tubelet_size=1)


#: Table 1: channels and blocks.
_SIZES = {'tiny': (192, 24), 'small': (384, 24), 'middle': (576, 32), 'base': (768, 24)}
_SCALED_UP = ('tiny', 'small', 'middle')
#: Of images (tables 2 and 1), then of clips: ``f`` and frames (tables 3, 4, 6), then pixels.
ARCHS = {
    **{size: _arch(*_SIZES[size]) for size in _SIZES},
    **{f'{size}_{side}': _arch(*_SIZES[size], image_size=side)
       for size in _SCALED_UP for side in (448, 576)},
    **{f'{size}_f{frames}': _arch(*_SIZES[size], num_frames=frames)
       for size in _SCALED_UP for frames in (8, 16, 32, 64)},
    **{f'{size}_f{frames}_{side}': _arch(*_SIZES[size], image_size=side, num_frames=frames)
       for size in _SCALED_UP for frames, side in ((16, 288), (64, 384))},
}

#: Orders of a clip's tokens (figure 7a): see :class:`vmamba_mm.models.VideoMamba`.
ORDERS = ('spatial-first', 'temporal-first', 'half-spatial-half-temporal',
          'half-temporal-half-spatial', 'alternate')

_COUNT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': _COUNT,
    'depth': _COUNT,
    'd_state': _COUNT,
    'patch_size': _COUNT,
    'image_size': Rule(lambda v: is_int(v, 1) or isinstance(v, tuple | list) and len(v) == 2
                       and all(is_int(side, 1) for side in v),
                       'an int of at least 1, or two: height and width'),
    'num_frames': Rule(lambda v: is_int(v, 0), 'an int of at least 0 (0: images, no clips)'),
    'tubelet_size': _COUNT,
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2').or_absent(),
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
    'norm': one_of('rms', 'ln').or_absent(),
    'order': one_of(*ORDERS).or_absent(),
}


def _check(arch: Mapping[str, Any]) -> None:
    frames, tubelet = arch['num_frames'], arch['tubelet_size']
    if frames % tubelet:
        raise ValueError(f"arch['num_frames']={frames} must be a multiple of "
                         f"arch['tubelet_size']={tubelet}")
    if not frames and tubelet != 1:
        raise ValueError(f"arch['tubelet_size']={tubelet} is of clips; for images (num_frames 0) "
                         'it must be 1')
    sides = arch['image_size'] if isinstance(arch['image_size'], tuple | list) \
        else (arch['image_size'],)
    if min(sides) < arch['patch_size']:
        raise ValueError(f"arch['image_size']={arch['image_size']} must be at least "
                         f"arch['patch_size']={arch['patch_size']}")


# --- names of weights -------------------------------------------------------------------------

# The official names are those of Vim, and the files of image models have nothing else that tells
# the two apart. Ours say that the position embedding is that of a frame.
KEYS = (
    ('layers.#', 'blocks.#'), ('patch_embed.proj', 'patch_embed.proj'),
    ('cls_token', 'cls_token'), ('pos_embed', 'spatial_pos_embed'),
    ('temporal_pos_embedding', 'temporal_pos_embed'),
    ('norm_f', 'norm'), ('norm', 'norm'),  # the latter in masked pre-training
)
HEAD_KEYS = (
    ('head', 'head.fc'),
    ('distill_head', 'distill_head'),  # of a student in self-distillation
    ('clip_decoder', 'clip_decoder'),  # of masked pre-training
    ('pool_norm', 'pool_norm'),  # of the video-text encoder
)
_DIRECTION = ('A{}_log', 'D{}', 'conv1d{}.weight', 'conv1d{}.bias', 'x_proj{}.weight',
              'dt_proj{}.weight', 'dt_proj{}.bias')


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The order of the tokens leaves no trace, nor does which side of an image is longer."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    first = 'blocks.0.mixer.'
    dims, _, *kernel = shapes['patch_embed.proj.weight']
    is_video = len(kernel) == 3
    if is_video != ('temporal_pos_embed' in shapes):
        raise ValueError('the patch embedding and the temporal one disagree about clips')
    tubelet, frames = (kernel[0], shapes['temporal_pos_embed'][1]) if is_video else (1, 0)
    _, tokens, _ = shapes['spatial_pos_embed']
    inner, d_state = shapes[f'{first}A_log']
    _, rank = shapes[f'{first}dt_proj.weight']
    *_, d_conv = shapes[f'{first}conv1d.weight']
    depth = len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})
    arch = dict(embed_dims=dims, depth=depth, d_state=d_state, patch_size=kernel[-1],
                image_size=infer_image_size(tokens - 1, kernel[-1]), num_frames=frames * tubelet,
                tubelet_size=tubelet)
    unusual = dict(d_conv=d_conv, expand=inner / dims,
                   dt_rank='auto' if rank == -(-dims // 16) else rank,
                   norm='ln' if 'norm.bias' in shapes else 'rms')
    usual = dict(d_conv=4, expand=2, dt_rank='auto', norm='rms')
    return arch | {k: v for k, v in unusual.items() if v != usual[k]}


# --- the official code's numbers ----------------------------------------------------------------

_SSM_KEYS = ('d_state', 'd_conv', 'expand', 'dt_rank')


def _parity_arch(kwargs: Options, is_video: bool) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VisionMamba`` of images or clips."""
    for key, value in dict(norm_epsilon=1e-5, bimamba=True).items():
        kwargs.require(key, value)
    # Of one function in fp32; and what only training has.
    kwargs.ignore('residual_in_fp32', 'fused_add_norm', 'drop_rate', 'drop_path_rate',
                  'fc_drop_rate', 'use_checkpoint', 'checkpoint_num')
    patch, tubelet = kwargs.get('patch_size', 16), kwargs.get('kernel_size', 1)
    kwargs.require('stride', patch)
    frames = kwargs.get('num_frames', 8) if is_video else 0
    size = kwargs.get('img_size', 224)
    arch = dict(
        embed_dims=kwargs.get('embed_dim', 192), depth=kwargs.get('depth', 24), d_state=16,
        patch_size=patch, image_size=size if isinstance(size, int) else tuple(size),
        num_frames=frames // tubelet * tubelet, tubelet_size=tubelet,
        norm='rms' if kwargs.get('rms_norm', True) else 'ln')
    ssm = kwargs.get('ssm_cfg') or {}
    return arch | {key: ssm[key] for key in _SSM_KEYS if key in ssm}


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, NAME.pth, or by the file's name what belongs to one way of training."""
    kwargs = options['kwargs']
    is_video = file.startswith(('video', 'inflate', 'pretrain', 'mm_'))
    backbone = dict(arch=_parity_arch(kwargs, is_video), in_channels=kwargs.get('channels', 3))

    def build(out_type):
        return Build('vmamba_mm.models:VideoMamba', dict(backbone, out_type=out_type))

    if file.startswith(('pretrain', 'mm_')):
        return _parity_masked(file, kwargs, build('raw'))
    num_classes = kwargs.get('num_classes', 1000)
    if file.startswith('distill'):
        kind = kwargs.require('model_type', 'student', 'teacher') or 'student'
        dims = kwargs.get('teacher_embed_dim', 384)
        return Subject(Build('vmamba_mm.heads:DistilledVideoMamba', dict(
            backbone=build('raw'), num_classes=num_classes,
            feature_dims=dims if kind == 'student' else None)), Call(view=list))
    classifier = Build('vmamba_mm.testing:Classifier', dict(
        backbone=build('cls_token'), num_classes=num_classes))
    call = Call(probes={'features': Probe('head.fc', side='input')})
    if not file.startswith('inflate'):
        return Subject(classifier, call)
    inflate = 'center' if options.get('center', True) else 'mean'
    return Subject(classifier, call, into='backbone', load=dict(inflate=inflate),
                   initial='extra_state',
                   loaded={'backbone.patch_embed.proj.weight': 'patch_embed_weight'})


def _parity_masked(file: str, kwargs: Options, backbone: Build) -> Subject:
    dims = backbone.kwargs['arch']['embed_dims']
    kwargs.require('clip_decoder_embed_dim', dims)
    arguments = dict(
        backbone=backbone, feature_dims=kwargs.get('clip_output_dim', 512),
        num_features=kwargs.get('clip_return_layer', 1),
        interval=kwargs.get('clip_student_return_interval', 1),
        add_last=not kwargs.get('fused_add_norm', True))
    inputs = dict(mask='mask')
    if file.startswith('pretrain'):
        normalize = (kwargs.require('clip_norm_type', 'l2', 'none') or 'l2') == 'l2'
        return Subject(Build('vmamba_mm.heads:MaskedVideoMamba', dict(
            arguments, normalize=normalize)), Call(kwargs=inputs))
    kwargs.require('add_pool_norm', True)
    return Subject(Build('vmamba_mm.heads:VideoEncoder', dict(
        arguments, pool=kwargs.get('pool_type', 'cls+avg'))), _encoder_call)


def _encoder_call(case: Options) -> Call:
    inputs = dict(mask='mask', keep_temporal='keep_temporal')
    return Call(kwargs=inputs, run=_run_on_images) if case.get('use_image') \
        else Call(kwargs=inputs, view=list)


def _run_on_images(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A clip of one frame is an image, as the official ``use_image`` has it."""
    image = inputs['input'].squeeze(2)
    return {'output': list(model(image, **{k: v for k, v in inputs.items() if k != 'input'}))}


def _parity_resize(section: str, case: Options) -> Subject:
    tubelet, frames = case['tubelet_size'], case['num_frames']
    case.ignore('old_size', 'orig_t_size')  # which the tensors tell
    names = ('pos_embed', 'temporal_pos_embedding')
    size = (frames // tubelet, case['new_size'], case['new_size'])
    return Subject(
        Build('vmamba_mm.models.videomamba:resize_pos_embeds', dict(size=size)),
        Call(args=names, outputs=('outputs',),
             view=lambda resized: {'outputs': dict(zip(names, resized, strict=True))}))


PARITY = Parity(
    subject=_parity_subject, ops={'op_interp_space_time.pt': _parity_resize},
    absences=(Omission('*', 'is resized when a file is loaded, without gradients',
                       'op_interp_space_time.pt'),
              Omission('gradients', 'of what is loaded, the outputs tell', 'inflate*'),
              Omission('grad_*', 'of what is loaded, the outputs tell', 'inflate*')),
    limits=(Limit('outputs.*', 1e-5, 'computed in fp32', 'op_interp_space_time.pt'),))

FAMILY = Family(
    name='videomamba', model='VideoMamba', archs=ARCHS, rules=RULES, check=_check, keys=KEYS,
    head_keys=HEAD_KEYS,
    signature=('blocks.0.mixer.A_b_log', 'blocks.0.norm.weight', 'blocks.0.mixer.in_proj.weight',
               'blocks.0.mixer.out_proj.weight',
               *(f'blocks.0.mixer.{name.format(suffix)}' for suffix in ('', '_b')
                 for name in _DIRECTION if name.format(suffix) != 'A_b_log'),
               'patch_embed.proj.weight', 'patch_embed.proj.bias', 'cls_token',
               'spatial_pos_embed', 'norm.weight'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch, parity=PARITY,
    licence='Apache-2.0', url='https://github.com/OpenGVLab/VideoMamba')
