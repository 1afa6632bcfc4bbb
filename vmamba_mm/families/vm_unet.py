"""VM-UNet (arXiv 2402.02491): its published architectures and the names of its weights.

The blocks have the names of VMamba's first public code, and a decoder beside them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rows, Rule, is_int
from vmamba_mm.families.parity import Build, Call, Omission, Options, Parity, Subject


def _arch(depth: int) -> dict[str, Any]:
    return dict(embed_dims=96, depths=(2, 2, depth, 2),
                decoder_depths=(2, 2, 2, 1) if depth == 2 else (2, depth, 2, 2), d_state=16)


#: By the blocks of the third stage. The published models are 'l2'; 'l9' is what the public class
#: has by default.
ARCHS = {'l2': _arch(2), 'l9': _arch(9)}

#: Options of the blocks' SS2D, as in the vanilla VMamba.
VANILLA = dict(ssm_ratio=2.0, conv_bias=True, gate=True)

_DEPTHS = Rule(
    lambda v: isinstance(v, (tuple, list)) and len(v) > 1 and all(is_int(n, 1) for n in v),
    'at least 2 ints of at least 1')
RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'depths': _DEPTHS, 'decoder_depths': _DEPTHS,
    'd_state': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
}


def _check(arch: Mapping[str, Any]) -> None:
    if len(arch['depths']) != len(arch['decoder_depths']):
        raise ValueError(f"arch['decoder_depths']={arch['decoder_depths']!r} must have as many "
                         f'stages as depths, {len(arch["depths"])}')


# --- names of weights -------------------------------------------------------------------------

_IN_BLOCKS = (('ln_1', 'norm1'), ('self_attention', 'ssm'))


def _keys(names: Collection[str]) -> Rows:
    """Our stages count on through the decoder: its first is that after the encoder's last."""
    official = {int(m[1]) for name in names if (m := re.match(r'layers_up\.(\d+)\.', name))}
    ours = {int(m[1]) for name in names if (m := re.match(r'stages\.(\d+)\.', name))}
    count = max(official) + 1 if official else (max(ours) + 2) // 2 if ours else 4
    decoder = [(f'layers_up.{i}', f'stages.{count + i}') for i in range(count)]
    return (
        *((f'{top}.blocks.#.{theirs}', f'{stage}.blocks.#.{our}') for top, stage in decoder
          for theirs, our in _IN_BLOCKS),
        *((f'layers.#.blocks.#.{theirs}', f'stages.#.blocks.#.{our}') for theirs, our in
          _IN_BLOCKS),
        ('layers.#.downsample', 'stages.#.downsample'),
        *((f'{top}.upsample', f'{stage}.upsample') for top, stage in decoder),
        ('patch_embed.proj', 'patch_embed.proj'), ('patch_embed.norm', 'patch_embed.norm'),
        ('final_up', 'final_up'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Half a file is told as well, so that a message can say what it holds."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    blocks = {tuple(map(int, m.groups())) for k in shapes
              if (m := re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', k))}
    count = 1 + sum(f'stages.{i}.downsample.reduction.weight' in shapes
                    for i in {stage for stage, _ in blocks})
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(2 * count))
    if count < 2 or sum(depths) < len(blocks):
        raise ValueError(f'{len(depths)} stages are no encoder and decoder')
    dims, = shapes['stages.0.blocks.0.norm1.weight']
    _, d_state = shapes['stages.0.blocks.0.ssm.A_logs']
    return dict(embed_dims=dims, depths=depths[:count], decoder_depths=depths[count:],
                d_state=d_state)


# --- the official code's numbers ----------------------------------------------------------------

def _parity_arch(kwargs: Options) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VMUNet``."""
    kwargs.ignore('drop_path_rate', 'load_ckpt_path')
    depths, dims = tuple(kwargs['depths']), list(kwargs.get('dims', (96, 192, 384, 768)))
    doubled = [dims[0] * 2 ** i for i in range(len(depths))]
    kwargs.require('dims', doubled, tuple(doubled))
    kwargs.require('dims_decoder', doubled[::-1], tuple(doubled[::-1]))
    d_state = kwargs.get('d_state', 16)
    return dict(embed_dims=dims[0], depths=depths, decoder_depths=tuple(kwargs['depths_decoder']),
                d_state=-(-dims[0] // 6) if d_state is None else d_state)


def _parity_subject(file: str, options: Options) -> Subject:
    """The segmentor, with a sigmoid if it has one class; or what is loaded from a VMamba."""
    kwargs = options['kwargs']
    arch, num_classes = _parity_arch(kwargs), kwargs['num_classes']
    backbone = dict(arch=arch, in_channels=kwargs['input_channels'])
    if 'source' in options:
        return _parity_init(options, backbone)
    return Subject(
        Build('vmamba_mm.testing:Segmentor', dict(
            backbone=Build('vmamba_mm.models:VMUNet', backbone), num_classes=num_classes)),
        Call(view=(lambda logits: logits.sigmoid()) if num_classes == 1 else None))


def _parity_init(options: Options, backbone: dict[str, Any]) -> Subject:
    """Each weight that the official code takes from the file, by our name."""
    from vmamba_mm.families.names import has_row, rename

    options.ignore('unused')
    source = {key.removeprefix('vmunet.'): options['source'][key] for key in options['source']}
    rows = _keys(source)
    return Subject(
        Build('vmamba_mm.models:VMUNet', backbone), load=dict(from_vmamba=True), has_cases=False,
        loaded={rename(key, rows): value for key, value in source.items()
                if value is not None and has_row(key, rows)})


def _parity_layer(section: str, case: Options) -> Subject:
    kwargs, kind = case['kwargs'], case['kind']
    if kind == 'merging':
        build = Build('vmamba_mm.layers:MergeDownsample', dict(dim=kwargs['dim'], odd='crop'))
    elif kind == 'expand':
        build = Build('vmamba_mm.layers:PatchExpand', dict(dim=2 * kwargs['dim']))
    elif kind == 'final':
        build = Build('vmamba_mm.layers:PatchExpand', dict(dim=kwargs['dim'], factor=4))
    elif kind == 'ss2d':
        build = Build('vmamba_mm.layers:SS2D', dict(
            dim=kwargs['d_model'], **_vanilla(kwargs['d_state'], kwargs['d_model'])))
    elif kind == 'vss_block':
        dim = kwargs['hidden_dim']
        kwargs.ignore('norm_layer')
        build = Build('vmamba_mm.layers:VSSBlock', dict(
            dim=dim, mlp_ratio=0.0, drop_path=0.0, with_cp=False,
            ssm_cfg=_vanilla(kwargs['d_state'], dim)))
        return Subject(build, convert=_convert_block, state='state_dict')
    else:
        raise ValueError(f'kind={kind!r} has no counterpart here')
    return Subject(build, convert=dict, state='state_dict')


def _vanilla(d_state: int | None, dim: int) -> dict[str, Any]:
    return dict(VANILLA, d_state=-(-dim // 6) if d_state is None else d_state)


def _convert_block(state: Mapping[str, Any]) -> dict[str, Any]:
    return {f'{dict(_IN_BLOCKS)[top]}.{rest}': value for (top, _, rest), value in (
        (key.partition('.'), value) for key, value in state.items())}


PARITY = Parity(
    subject=_parity_subject, ops={'op_layers.pt': _parity_layer},
    absences=(Omission('vmamba_init.expected.pt', 'each weight is compared with that in the file '
                       'it comes from', 'vmamba_init'),))

_SSM = ('in_proj.weight', 'conv2d.weight', 'conv2d.bias', 'x_proj_weight', 'dt_projs_weight',
        'dt_projs_bias', 'A_logs', 'Ds', 'out_norm.weight', 'out_proj.weight')
FAMILY = Family(
    name='vm_unet', model='VMUNet', archs=ARCHS, rules=RULES, check=_check, keys=_keys,
    head_keys=(('final_conv', 'decode_head.conv_seg'),), place='vmunet.',
    has_head_inside=True, task='seg',
    signature=('stages.0.blocks.0.ssm.A_logs', 'stages.0.blocks.0.norm1.weight',
               *(f'stages.0.blocks.0.ssm.{name}' for name in _SSM if name != 'A_logs'),
               'stages.0.downsample.norm.weight', 'patch_embed.proj.weight', 'final_up.norm.weight',
               'final_up.expand.weight'),
    first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch,
    weights_key='model_state_dict', parity=PARITY, licence='Apache-2.0',
    url='https://github.com/JCruan519/VM-UNet')
