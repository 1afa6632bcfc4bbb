"""EfficientViM (arXiv 2411.15241): the four published architectures, the names of its weights."""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import (
    Family,
    Rule,
    are_ints,
    count_blocks,
    is_number,
    sizes_of_stages,
)
from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Probe, Subject


def _arch(embed_dims: tuple[int, ...], depths: tuple[int, ...], d_state: tuple[int, ...]
          ) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, d_state=d_state)


ARCHS = {
    'm1': _arch((128, 192, 320), (2, 2, 2), (49, 25, 9)),
    'm2': _arch((128, 256, 512), (2, 2, 2), (49, 25, 9)),
    'm3': _arch((224, 320, 512), (2, 2, 2), (49, 25, 9)),
    'm4': _arch((224, 320, 512), (3, 4, 2), (64, 32, 16)),
}
#: What the optional keys of an arch are where they are absent, as published.
DEFAULTS = dict(expand=1.0, mlp_ratio=4.0)

_COUNTS = Rule(lambda v: are_ints(v, 1, 3), '3 ints of at least 1')
_RATIO = Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True)
RULES = {
    'embed_dims': Rule(lambda v: are_ints(v, 1, 3) and v[0] % 8 == 0,
                       '3 ints of at least 1, the first of them a multiple of 8'),
    'depths': _COUNTS, 'd_state': _COUNTS, 'expand': _RATIO, 'mlp_ratio': _RATIO,
}


def _check(arch: Mapping[str, Any]) -> None:
    least = min(arch['embed_dims'])
    for key in ('expand', 'mlp_ratio'):
        if int(arch.get(key, DEFAULTS[key]) * least) < 1:
            raise ValueError(f'arch[{key!r}]={arch[key]!r} leaves no channel of the {least} of a '
                             f'stage; it must be at least 1/{least}')


# --- names of weights -------------------------------------------------------------------------

_LINEAR = ('BCdt_proj', 'hz_proj', 'out_proj')
_KEYS = (
    ('patch_embed', 'patch_embed'),
    *((f'stages.#.blocks.#.mixer.{name}.conv', f'stages.#.blocks.#.mixer.{name}')
      for name in (*_LINEAR, 'dw')),
    *((f'stages.#.blocks.#.{name}', f'stages.#.blocks.#.{name}') for name in (
        'alpha', 'mixer.A', 'mixer.D', 'norm', 'dwconv1', 'dwconv2', 'ffn')),
    ('stages.#.downsample', 'stages.#.downsample'), ('norm.#', 'norm#'))
#: The official linear layers are convolutions, and the official norms are of (B, C, ...).
_SHAPES = (
    (rf'mixer\.(?:{"|".join(_LINEAR)})\.weight$', (None, None, 1), (None, None)),
    (r'downsample\.conv\.2\.fc\d\.weight$', (None, None, 1, 1), (None, None)),
    (r'^(?:.*\.)?(?:blocks\.\d+\.norm|norm[012])\.(?:weight|bias)$', (1, None, 1), (None,)),
    (r'^(?:.*\.)?norm3\.(?:weight|bias)$', (1, None, 1, 1), (None,)))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, d_state = (sizes_of_stages(shapes, f'blocks.0.mixer.{name}', 3)
                     for name in ('out_proj.weight', 'A'))
    arch = dict(embed_dims=dims, depths=count_blocks(shapes, 3), d_state=d_state)
    found = dict(expand=shapes['stages.0.blocks.0.mixer.out_proj.weight'][1] / dims[0],
                 mlp_ratio=shapes['stages.0.blocks.0.ffn.fc1.conv.weight'][0] / dims[0])
    return arch | {k: v for k, v in found.items() if v != DEFAULTS[k]}


# --- the official code's numbers ----------------------------------------------------------------

def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, with the maps of its stages and their last states."""
    kwargs = options['kwargs']
    options.ignore('note')
    dims, depths = tuple(kwargs['embed_dim']), kwargs['depths']
    arch = dict(embed_dims=dims, depths=tuple(depths), d_state=tuple(kwargs['state_dim']),
                expand=kwargs.get('ssd_expand', 1.0), mlp_ratio=kwargs.get('mlp_ratio', 4.0))
    num_classes = kwargs['num_classes']
    head = dict(num_classes=num_classes, in_channels=(*dims, dims[-1]),
                distilled=kwargs.get('distillation', False))
    classifier = Build('vmamba_mm.testing:Classifier', dict(
        backbone=Build('vmamba_mm.models:EfficientViM', dict(
            arch=arch, out_indices=(2,), with_states=True,
            in_channels=kwargs.get('in_dim', 3))),
        num_classes=num_classes, head=Build('vmamba_mm.heads:StageFusionHead', head)))
    last = [f'backbone.stages.{i}.blocks.{depth - 1}' for i, depth in enumerate(depths)]
    return Subject(classifier, Call(probes=dict(
        features=tuple(Probe(block, view=_map_of) for block in last),
        hidden=tuple(Probe(block, view=_state_of) for block in last))))


def _map_of(result: tuple) -> Any:
    return result[0].permute(0, 3, 1, 2)


def _state_of(result: tuple) -> Any:
    return result[1].mT


PARITY = Parity(subject=_parity_subject, omissions=(
    Omission('grad_params.*.mixer.A', 'zero but for rounding: the softmax over tokens cancels A'),))

FAMILY = Family(
    name='efficientvim', model='EfficientViM', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS,
    head_keys=(('heads.#', 'head.fc.#'), ('weights', 'head.weights'),
               ('heads_dist.#', 'head.fc_dist.#'), ('weights_dist', 'head.weights_dist')),
    signature=('stages.0.blocks.0.mixer.hz_proj.weight', *(f'stages.0.blocks.0.{name}' for name in (
        'alpha', 'mixer.A', 'mixer.D', 'mixer.BCdt_proj.weight', 'mixer.dw.weight',
        'mixer.out_proj.weight', 'norm.weight', 'norm.bias', 'dwconv1.conv.weight',
        'dwconv2.conv.weight', 'ffn.fc1.conv.weight', 'ffn.fc2.conv.weight')),
        'patch_embed.conv.0.conv.weight'),
    first_convs=('patch_embed.conv.0.conv.weight',), shapes=_SHAPES, infer_arch=_infer_arch,
    in_timm=True, parity=PARITY, licence='MIT', url='https://github.com/mlvlab/EfficientViM')
