"""MambaIR (arXiv 2402.15648): its published architectures and the names of its weights.

Our names are the official ones. The block of convolutions in the lightweight models has three
generations in the public code, which names and shapes tell. The parity of MambaIRv2 and of the
U-Net for real noise, which share the folder, is here too.
"""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, is_number, one_of
from vmamba_mm.families.mambair_unet import ssm_ratio_of
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject

_SR = dict(embed_dims=180, depths=(6,) * 6, d_state=16, ssm_ratio=2.0, cab='full',
           resi_connection='1conv', upsampler='pixelshuffle', upscale=2)
_LIGHT = dict(embed_dims=60, depths=(6,) * 4, d_state=10, ssm_ratio=1.2, cab='light',
              resi_connection='1conv', upsampler='pixelshuffledirect', upscale=2)
#: The generations of the lightweight models: from the newest code on.
_GENERATIONS = {'': {}, '_2024_03': dict(cab='light_2024_03', d_state=16, ssm_ratio=1.5),
                '_2024_02': dict(cab='light_2024_02', d_state=16)}

#: By task and scale. 'denoise' is the network of colour and grey noise and of JPEG artefacts; what
#: follows 'light_x2' is the month of the public code that has this block.
ARCHS = {
    **{f'sr_x{n}': dict(_SR, upscale=n) for n in (2, 3, 4)},
    **{f'light_x{n}{end}': dict(_LIGHT, upscale=n, **change)
       for end, change in _GENERATIONS.items() for n in (2, 3, 4)},
    'denoise': dict(_SR, ssm_ratio=1.2, upsampler='', upscale=1),
    'real_sr_x4': dict(_SR, upsampler='nearest+conv', upscale=4),
}

#: Which upsampler goes to which sizes, for :func:`check_upscale`.
UPSCALES = {'': (1,), 'pixelshuffle': (2, 3, 4, 8), 'nearest+conv': (4,)}
#: Rules of what the versions have in common.
TAIL_RULES = {
    'resi_connection': one_of('1conv', '3conv'),
    'upsampler': one_of('', 'pixelshuffle', 'pixelshuffledirect', 'nearest+conv'),
    'upscale': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
}
DEPTHS = Rule(lambda v: isinstance(v, (tuple, list)) and len(v) > 0
              and all(is_int(n, 1) for n in v), 'ints of at least 1')
RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 30), 'an int of at least 30'),
    'depths': DEPTHS,
    'd_state': Rule(lambda v: is_int(v, 1), 'an int of at least 1'),
    'ssm_ratio': Rule(lambda v: is_number(v, 0.1), 'a number of at least 0.1'),
    'cab': one_of('full', 'light', 'light_2024_03', 'light_2024_02'),
    **TAIL_RULES,
}


def check_upscale(arch: Mapping[str, Any]) -> None:
    """Raise a line if the upsampler cannot go that far."""
    upsampler, upscale = arch['upsampler'], arch['upscale']
    choices = UPSCALES.get(upsampler)
    if choices and upscale not in choices:
        raise ValueError(f"arch['upscale']={upscale} does not go with upsampler={upsampler!r}; it "
                         f'must be {" or ".join(map(str, choices))}')


# --- names of weights -------------------------------------------------------------------------

_TAIL_KEYS = ('conv_before_upsample.#', 'upsample.#', 'conv_up1', 'conv_up2', 'conv_hr',
              'conv_last')


def group_keys(*inner: str) -> tuple[tuple[str, str], ...]:
    """The rows of a network of residual groups, whose names are the official ones.

    Args:
        inner: what is in it besides.
    """
    return tuple((name, name) for name in (
        'conv_first', 'patch_embed.norm', *inner, 'layers.#.conv', 'norm', 'conv_after_body',
        *_TAIL_KEYS))


def infer_tail(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The keys of an arch that the weights around the groups tell.

    Args:
        shapes: of the weights, by name.
    """
    found = dict(resi_connection='3conv' if 'conv_after_body.0.weight' in shapes else '1conv')
    if 'conv_hr.weight' in shapes:
        return found | dict(upsampler='nearest+conv', upscale=4)
    if 'conv_before_upsample.0.weight' in shapes:
        width = shapes['conv_before_upsample.0.weight'][0]
        steps = [shapes[k][0] // width for k in shapes if re.match(r'upsample\.\d+\.weight', k)]
        return found | dict(upsampler='pixelshuffle',
                            upscale=3 if steps == [9] else 2 ** len(steps))
    if 'upsample.0.weight' in shapes:
        per_channel = shapes['upsample.0.weight'][0] // shapes['conv_first.weight'][1]
        return found | dict(upsampler='pixelshuffledirect', upscale=round(per_channel ** 0.5))
    return found | dict(upsampler='', upscale=1)


def count_groups(names: Mapping[str, Any], inner: str) -> tuple[int, ...]:
    """How many blocks, ``layers.I.residual_group.INNER.J``, each group has."""
    found = {tuple(map(int, m.groups())) for name in names
             if (m := re.match(rf'layers\.(\d+)\.residual_group\.{inner}\.(\d+)\.', name))}
    depths = tuple(sum(group == i for group, _ in found)
                   for i in range(1 + max((group for group, _ in found), default=-1)))
    if 0 in depths or not depths:
        raise ValueError(f'groups of {depths} blocks are no network')
    return depths


_BLOCK = 'layers.0.residual_group.blocks.0'


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dim, = shapes[f'{_BLOCK}.skip_scale']
    inner, = shapes[f'{_BLOCK}.self_attention.out_norm.weight']
    _, d_state = shapes[f'{_BLOCK}.self_attention.A_logs']
    cab = f'{_BLOCK}.conv_blk.cab'
    if f'{cab}.5.attention.1.weight' in shapes:
        kind = 'light'
    elif f'{cab}.1.attention.1.weight' in shapes:
        kind = 'light_2024_02'
    else:
        kind = 'full' if shapes[f'{cab}.0.weight'][0] == dim // 3 else 'light_2024_03'
    return dict(embed_dims=dim, depths=count_groups(shapes, 'blocks'), d_state=d_state,
                ssm_ratio=ssm_ratio_of(inner, dim), cab=kind, **infer_tail(shapes))


# --- the official code's numbers ----------------------------------------------------------------

_V2_CLASSES = {'MambaIRv2': 'conv', 'MambaIRv2Light': 'gated'}


def _parity_subject(file: str, options: Options) -> Subject:
    kwargs, kind = options['kwargs'], options['cls']
    if kind == 'MambaIRUNet':
        kwargs.require('out_channels', kwargs['inp_channels'])
        kwargs.require('bias', False)
        kwargs.require('dual_pixel_task', False)
        arch = dict(embed_dims=kwargs['dim'], depths=tuple(kwargs['num_blocks']), d_state=16,
                    refinement_depth=kwargs['num_refinement_blocks'],
                    ssm_ratio=kwargs['mlp_ratio'])
        return Subject(Build('vmamba_mm.models:MambaIRUNet', dict(
            arch=arch, in_channels=kwargs['inp_channels'])))
    kwargs.ignore('img_size', 'drop_path_rate')  # they have no effect in evaluation
    upsampler = kwargs.get('upsampler', '')
    arch = dict(embed_dims=kwargs['embed_dim'], depths=tuple(kwargs['depths']),
                d_state=kwargs['d_state'], upsampler=upsampler, upscale=kwargs['upscale'],
                resi_connection=kwargs.get('resi_connection', '1conv'))
    channels = dict(in_channels=kwargs.get('in_chans', 3), img_range=kwargs.get('img_range', 1.0))
    if kind in _V2_CLASSES:
        arch |= {key: kwargs[key] for key in ('window_size', 'inner_rank', 'num_tokens',
                                              'mlp_ratio')}
        kernel, ffn = kwargs['convffn_kernel_size'], _V2_CLASSES[kind]
        arch |= dict(num_heads=tuple(kwargs['num_heads']), ffn=ffn,
                     conv_kernel=5 if ffn == 'gated' else kernel)  # which does not look at it
        return Subject(Build('vmamba_mm.models:MambaIRv2', dict(
            arch=arch, stable_sort=False, **channels)), _v2_call)  # the numbers are of a CPU
    # Such as 'MambaIR (2024-03-19 light CAB)'.
    if not (match := re.fullmatch(r'MambaIR(?: \((\d{4})-(\d\d)-\d\d light CAB\))?', kind)):
        raise ValueError(f'cls={kind!r} has no counterpart here')
    cab = 'full' if upsampler != 'pixelshuffledirect' else \
        '_'.join(['light', *filter(None, match.groups())])
    return Subject(Build('vmamba_mm.models:MambaIR', dict(
        arch=dict(arch, ssm_ratio=kwargs['mlp_ratio'], cab=cab), **channels)))


def _v2_call(case: Options) -> Call:
    case.ignore('min_route_margin')  # how far the two best logits are apart
    case.require('gumbel', None)  # no noise; else it is an input
    return Call(kwargs={'gumbel': 'noise'})


def _parity_layer(section: str, case: Options) -> Subject:
    kwargs = case['kwargs']
    if section == 'ss2d':
        return Subject(Build('vmamba_mm.layers:SS2D', dict(
            dim=kwargs['d_model'], d_state=kwargs['d_state'], ssm_ratio=kwargs['expand'],
            conv_bias=True, gate=True)),
            Call(args=('input_bhwc',), gradients={'grad_input': 'input_bhwc'}),
            convert=dict, state='params')
    return Subject(
        Build('vmamba_mm.testing:TokenScanAlone', dict(
            size=tuple(case['x_size']), inner_rank=kwargs['inner_rank'], d_state=kwargs['d_state'],
            scan=Build('vmamba_mm.models.mambair_v2:TokenScan', dict(stable_sort=False, **{
                key: kwargs[key] for key in ('dim', 'd_state', 'num_tokens', 'inner_rank',
                                             'mlp_ratio')})))),
        Call(args=('input_bnc', 'gumbel'), gradients={'grad_input': 'input_bnc'}),
        convert=_convert_token_scan, state='params')


def _convert_token_scan(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key if key.startswith('token.') else f'scan.{key}': v for key, v in state.items()}


def _parity_metrics(section: str, case: Options) -> Subject:
    return Subject(
        Build('vmamba_mm.mm.restoration.metrics:compare_bgr', dict(
            crop_border=case['crop_border'], on_luma=case['test_y_channel'])),
        Call(args=('img_bgr', 'img2_bgr'), outputs=('psnr', 'ssim')))


def _parity_tiles(section: str, case: Options) -> Subject:
    return Subject(
        Build('vmamba_mm.testing:restore_recording_tiles', dict(
            scale=case['scale'], restore=Build('vmamba_mm.mm.restoration.tiles:restore_in_tiles'))),
        Call(outputs=('output', 'tile_input_sizes')))


_LUMA = 'the public code has the luma in fp32'
PARITY = Parity(
    subject=_parity_subject,
    ops={'op_ss2d_assm.pt': _parity_layer, 'op_metrics.pt': _parity_metrics,
         'op_tiled_test.pt': _parity_tiles},
    absences=(Omission('gradients', 'the file holds no gradients'),
              Omission('grad_gumbel', 'noise needs no gradient')),
    limits=(Limit('psnr', 2e-6, _LUMA, 'op_metrics.pt'),
            Limit('ssim', 2e-6, _LUMA, 'op_metrics.pt'),
            Limit('output', 1e-6, 'the stored numbers are fp32', 'op_tiled_test.pt')))

FAMILY = Family(
    name='mambair', model='MambaIR', archs=ARCHS, rules=RULES, check=check_upscale,
    keys=group_keys(*(f'layers.#.residual_group.blocks.#.{name}' for name in (
        'skip_scale', 'skip_scale2', 'ln_1', 'ln_2', 'self_attention', 'conv_blk'))),
    signature=(f'{_BLOCK}.skip_scale', f'{_BLOCK}.skip_scale2', f'{_BLOCK}.ln_1.weight',
               f'{_BLOCK}.self_attention.A_logs', f'{_BLOCK}.self_attention.out_norm.weight',
               f'{_BLOCK}.conv_blk.cab.0.weight', 'conv_first.weight', 'patch_embed.norm.weight',
               'norm.weight'),
    first_convs=('conv_first.weight',), infer_arch=_infer_arch, task='restoration',
    weights_key='params', parity=PARITY, licence='Apache-2.0',
    url='https://github.com/csguoh/MambaIR')
