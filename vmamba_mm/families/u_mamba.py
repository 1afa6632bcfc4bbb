"""U-Mamba (arXiv 2401.04722): its published architectures and the names of its weights.

A whole network for nnU-Net, of images or volumes, in two variants: 'bot' has one Mamba layer at the
bottom of the U, 'enc' one after stages of the encoder. What an arch says has the names of nnU-Net's
plans. Our names are the official ones.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, one_of
from vmamba_mm.families.parity import Build, Limit, Options, Parity, Size, Subject

Sizes = tuple[tuple[int, ...], ...]


def reduced_depths(n_conv_per_stage: int | Sequence[int],
                   n_conv_per_stage_decoder: int | Sequence[int], num_stages: int
                   ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks that the public code makes of a plan's: one in the later half of the stages.

    Those of the decoder count from the bottom up, so that there the shallow ones lose blocks.

    Args:
        n_conv_per_stage, n_conv_per_stage_decoder: of nnU-Net's plans; an int stands for all.
        num_stages: of the encoder; the decoder has one less.
    """
    def blocks(given, count, first):
        given = [given] * count if isinstance(given, int) else given
        return tuple(1 if i >= first else n for i, n in enumerate(given))

    return (blocks(n_conv_per_stage, num_stages, math.ceil(num_stages / 2)),
            blocks(n_conv_per_stage_decoder, num_stages - 1, math.ceil(num_stages / 2)))


def _arch(variant: str, features: Sequence[int], kernel_sizes: Sizes, strides: Sizes,
          input_size: tuple[int, ...]) -> dict[str, Any]:
    depths, decoder_depths = reduced_depths(2, 2, len(features))
    arch = dict(variant=variant, features_per_stage=tuple(features), kernel_sizes=kernel_sizes,
                strides=strides, n_conv_per_stage=depths, n_conv_per_stage_decoder=decoder_depths)
    return arch | (dict(input_size=input_size) if variant == 'enc' else {})


def _volumes(variant: str, input_size: tuple[int, ...]) -> dict[str, Any]:
    return _arch(variant, (32, 64, 128, 256, 320, 320), ((1, 3, 3), *((3, 3, 3),) * 5),
                 ((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 3, (1, 2, 2)), input_size)


def _images(variant: str, input_size: tuple[int, ...], num_stages: int) -> dict[str, Any]:
    features = [min(32 * 2 ** i, 512) for i in range(num_stages)]
    return _arch(variant, features, ((3, 3),) * num_stages,
                 ((1, 1), *((2, 2),) * (num_stages - 1)), input_size)


#: By variant and data of the paper: abdominal organs in CT and MR, instruments in endoscopy, cells
#: in microscopy. The paper gives patch sizes, stages and poolings per axis; which stage pools which
#: axis, and the kernels, are what nnU-Net plans for such a patch.
ARCHS = {
    'bot_abdomen': _volumes('bot', ()),
    'enc_abdomen_ct': _volumes('enc', (40, 224, 192)),
    'enc_abdomen_mr': _volumes('enc', (48, 160, 224)),
    'bot_endoscopy': _images('bot', (), 7),
    'enc_endoscopy': _images('enc', (384, 640), 7),
    'bot_microscopy': _images('bot', (), 8),
    'enc_microscopy': _images('enc', (512, 512), 8),
}


def _are_depths(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(is_int(n, 1) for n in value)


def _is_size(value: Any) -> bool:
    return _are_depths(value) and len(value) in (2, 3)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 1 and all(map(_is_size, value))


_DEPTHS = Rule(_are_depths, 'ints of at least 1')
RULES = {
    'variant': one_of('bot', 'enc'),
    'features_per_stage': _DEPTHS,
    'kernel_sizes': Rule(
        lambda v: _are_sizes(v) and all(n % 2 for size in v for n in size),
        'for each of at least 2 stages 2 or 3 odd ints'),
    'strides': Rule(_are_sizes, 'for each of at least 2 stages 2 or 3 ints of at least 1'),
    'n_conv_per_stage': _DEPTHS,
    'n_conv_per_stage_decoder': _DEPTHS,
    'input_size': Rule(lambda v: v is None or _is_size(v),
                       '2 or 3 ints of at least 1, or None where no tokens are channels',
                       optional=True),
}


def _check(arch: Mapping[str, Any]) -> None:
    count, size = len(arch['features_per_stage']), arch.get('input_size')
    for key, length in (('kernel_sizes', count), ('strides', count), ('n_conv_per_stage', count),
                        ('n_conv_per_stage_decoder', count - 1)):
        if len(arch[key]) != length:
            raise ValueError(f'arch[{key!r}] has {len(arch[key])} entries and must have {length}: '
                             f'there are {count} stages')
    dimensions = {len(sizes) for key in ('kernel_sizes', 'strides') for sizes in arch[key]}
    if len(dimensions | ({len(size)} if size else set())) > 1:
        raise ValueError("arch['kernel_sizes'], arch['strides'] and arch['input_size'] must all be "
                         'of images (2 ints) or all of volumes (3 ints)')
    if size is not None and arch['variant'] == 'bot':
        raise ValueError("arch['input_size'] is an option of the variant 'enc': a network of the "
                         "variant 'bot' takes every size")
    strides = total_strides(arch)[-1]
    if size is not None and any(n % stride for n, stride in zip(size, strides, strict=True)):
        raise ValueError(f"arch['input_size']={tuple(size)} must be multiples of the product of "
                         f'the strides, {strides}')


def total_strides(arch: Mapping[str, Any]) -> Sizes:
    """What one position of each stage's map stands for, in positions of the input, by axis."""
    return tuple(accumulate(map(tuple, arch['strides']),
                            lambda a, b: tuple(map(mul, a, b))))


def token_widths(arch: Mapping[str, Any]) -> list[tuple[int, bool] | None]:
    """The Mamba layer after each stage: (channels of a token, whether the tokens are the map's
    channels and not its positions); None for no layer.

    In the variant 'enc' tokens are channels wherever a map has no more positions than channels.
    Networks of images have a layer after every second stage alone, the last one among them.
    """
    features, size = arch['features_per_stage'], arch.get('input_size')
    count, is_2d = len(features), len(arch['strides'][0]) == 2
    widths: list[tuple[int, bool] | None] = []
    for i, (channels, strides) in enumerate(zip(features, total_strides(arch), strict=True)):
        if arch['variant'] == 'bot':
            has_layer = i == count - 1
        else:
            has_layer = not is_2d or (count - 1 - i) % 2 == 0
        positions = math.inf if size is None else math.prod(
            n // stride for n, stride in zip(size, strides, strict=True))
        is_channels = positions <= channels
        widths.append(((int(positions) if is_channels else channels), is_channels)
                      if has_layer else None)
    return widths


# --- names of weights -------------------------------------------------------------------------

def first_name(name: str) -> str:
    """The name of a weight that has several: the decoder has the encoder in it once more, and the
    convolution and norm of a block lie in ``all_modules`` too."""
    name = name.removeprefix('decoder.') if name.startswith('decoder.encoder.') else name
    name = name.replace('.all_modules.0.', '.conv.')
    return name.replace('.all_modules.1.', '.norm.')


_KEYS = tuple((name, name) for name in (
    'encoder.stem.#', 'encoder.mamba_layers.#', 'encoder.stages.#', 'mamba_layer.norm',
    'mamba_layer.mamba', 'decoder.encoder', 'decoder.stages.#', 'decoder.upsample_layers.#',
    'decoder.seg_layers.#'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Strides leave no trace, and nor do the sides of a map whose channels are tokens: they are
    those of the published network with these shapes, or what nnU-Net mostly plans."""
    shapes = {first_name(k): tuple(v.shape) for k, v in weights.items()}
    blocks = {m.groups() for k in shapes
              if (m := re.match(r'(encoder|decoder)\.stages\.(\d+)\.(\d+)\.', k))}
    num_stages, num_decoder = (len({int(i) for part, i, _ in blocks if part == side})
                               for side in ('encoder', 'decoder'))
    firsts = [shapes[f'encoder.stages.{i}.0.conv1.weight'] for i in range(num_stages)]
    if num_stages < 2 or num_decoder != num_stages - 1 or len(firsts[0]) not in (4, 5):
        raise ValueError(f'{num_stages} stages and {num_decoder} of the decoder are no U')

    def depths(side, count):
        return tuple(sum(part == side and int(i) == stage for part, i, _ in blocks)
                     for stage in range(count))

    kernels = tuple(shape[2:] for shape in firsts)
    arch = dict(
        variant='bot' if 'mamba_layer.norm.weight' in shapes else 'enc',
        features_per_stage=tuple(shape[0] for shape in firsts), kernel_sizes=kernels,
        strides=(tuple(1 for _ in kernels[0]),
                 *(tuple(1 if n == 1 else 2 for n in kernel) for kernel in kernels[:-1])),
        n_conv_per_stage=depths('encoder', num_stages),
        n_conv_per_stage_decoder=depths('decoder', num_decoder))
    if arch['variant'] == 'bot':
        layers = {num_stages - 1: shapes['mamba_layer.norm.weight'][0]}
    else:
        layers = {i: shapes[name][0] for i in range(num_stages)
                  if (name := f'encoder.mamba_layers.{i}.norm.weight') in shapes}
    for published in ARCHS.values():
        if all(arch[key] == published[key] for key in arch if key != 'strides') \
                and layers == _widths(published):
            return dict(published)
    channels = {i: n for i, n in layers.items() if n != arch['features_per_stage'][i]}
    if channels:
        stage, positions = next(iter(channels.items()))
        strides = total_strides(arch)
        arch['input_size'] = tuple(map(mul, _near_cube(positions, len(kernels[0])),
                                       strides[stage]))
        last = strides[-1]
        arch['input_size'] = tuple(-(-n // step) * step
                                   for n, step in zip(arch['input_size'], last, strict=True))
    return arch


def _widths(arch):
    return {i: layer[0] for i, layer in enumerate(token_widths(arch)) if layer is not None}


def _near_cube(count: int, dimensions: int) -> tuple[int, ...]:
    """So many ints with this product, as near to each other as its divisors allow."""
    if dimensions == 1:
        return (count,)
    side = next(n for n in range(int(count ** (1 / dimensions) + 1e-9), 0, -1) if count % n == 0)
    return side, *_near_cube(count // side, dimensions - 1)


# --- the official code's numbers ----------------------------------------------------------------

def arch_of_plan(variant: str, *, features_per_stage: Sequence[int],
                 kernel_sizes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]],
                 n_conv_per_stage: int | Sequence[int],
                 n_conv_per_stage_decoder: int | Sequence[int],
                 patch_size: Sequence[int] | None = None) -> dict[str, Any]:
    """The arch that the public code builds for what nnU-Net planned.

    Args:
        variant: 'bot' or 'enc'.
        features_per_stage, kernel_sizes, strides, n_conv_per_stage, n_conv_per_stage_decoder: of
            the plan; see :func:`reduced_depths`.
        patch_size: of 'enc', whose networks take this size alone where tokens are channels.
    """
    depths, decoder_depths = reduced_depths(n_conv_per_stage, n_conv_per_stage_decoder,
                                            len(features_per_stage))
    arch = dict(variant=variant, features_per_stage=tuple(features_per_stage),
                kernel_sizes=tuple(map(tuple, kernel_sizes)), strides=tuple(map(tuple, strides)),
                n_conv_per_stage=depths, n_conv_per_stage_decoder=decoder_depths)
    return arch | (dict(input_size=tuple(patch_size)) if variant == 'enc' else {})


def _parity_subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    dimensions = len(kwargs['strides'][0])
    kwargs.require('conv_op', f'Conv{dimensions}d')
    kwargs.require('norm_op', f'InstanceNorm{dimensions}d')
    kwargs['norm_op_kwargs'].require('eps', 1e-5)
    kwargs['norm_op_kwargs'].require('affine', True)
    kwargs.require('conv_bias', True)
    kwargs.require('nonlin', 'LeakyReLU')
    kwargs['nonlin_kwargs'].ignore('inplace')
    kwargs.require('n_stages', len(kwargs['features_per_stage']))
    arch = arch_of_plan(
        'enc' if 'input_size' in kwargs else 'bot', patch_size=kwargs.get('input_size'),
        **{key: kwargs[key] for key in ('features_per_stage', 'kernel_sizes', 'strides',
                                        'n_conv_per_stage', 'n_conv_per_stage_decoder')})
    return Subject(Build('vmamba_mm.models:UMamba', dict(
        arch=arch, in_channels=kwargs['input_channels'], num_classes=kwargs['num_classes'],
        deep_supervision=kwargs.get('deep_supervision', False))))


def _parity_layer(section: str, case: Options) -> Subject:
    for key, value in (('d_state', 16), ('d_conv', 4), ('expand', 2)):
        case.require(key, value)
    kind = case.require('kind', 'patch', 'channel')
    return Subject(Build('vmamba_mm.models.u_mamba:MambaLayer', dict(
        dim=Size('norm.weight', 0), channel_token=kind == 'channel')),
        convert=dict, state='state_dict')


_DEEP = 'deep networks of instance norms are ill-conditioned'
PARITY = Parity(
    subject=_parity_subject, ops={'op_mamba_layer.pt': _parity_layer},
    limits=tuple(Limit(name, error, _DEEP, file='*.pth') for name, error in (
        ('output*', 1e-4), ('grad_*', 1e-3))))

FAMILY = Family(
    name='u_mamba', model='UMamba', takes='volumes', archs=ARCHS, rules=RULES, check=_check,
    keys=_KEYS,
    signature=('decoder.seg_layers.0.weight', 'encoder.stem.0.conv1.weight',
               'encoder.stem.0.conv3.weight', 'encoder.stages.0.0.conv3.weight',
               'decoder.stages.0.0.conv3.weight', 'decoder.upsample_layers.0.conv.weight'),
    first_convs=('encoder.stem.0.conv1.weight', 'encoder.stem.0.conv3.weight'),
    infer_arch=_infer_arch, weights_key='network_weights', parity=PARITY, licence='Apache-2.0',
    url='https://github.com/bowang-lab/U-Mamba')
