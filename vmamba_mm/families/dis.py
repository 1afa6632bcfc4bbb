"""DiS (arXiv 2402.05608): its published architectures and the names of its weights, which are ours
as well."""

import re
from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, is_number, one_of
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject

#: Channels and depth of each size; the public code's "24" are 25 blocks.
_SIZES = {'small': (368, 24), 'base': (768, 24), 'medium': (768, 48), 'large': (1024, 48),
          'huge': (1536, 48)}

#: Of latents of ImageNet at 256 pixels; other tasks differ in the last three keys. ``small_p2`` is
#: the DiS-S/2 of the paper.
ARCHS = {f'{size}_p{patch}': dict(embed_dims=dims, depth=depth, patch_size=patch, image_size=32,
                                  in_channels=4, num_classes=1000)
         for size, (dims, depth) in _SIZES.items() for patch in (2, 4)}

_COUNT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
_BOOL = Rule(lambda v: isinstance(v, bool), 'True or False', optional=True)
RULES = {
    'embed_dims': Rule(lambda v: is_int(v, 2), 'an int of at least 2'),
    'depth': Rule(lambda v: is_int(v, 2), 'an int of at least 2'),
    'patch_size': _COUNT,
    'image_size': _COUNT,
    'in_channels': _COUNT,
    'num_classes': Rule(lambda v: is_int(v, 0), 'an int of at least 0, which is for no classes'),
    'learn_sigma': _BOOL,
    'skip': _BOOL,
    'norm': one_of('rms', 'ln').or_absent(),
    'd_state': _COUNT.or_absent(),
    'd_conv': Rule(lambda v: is_int(v, 2), 'an int of at least 2', optional=True),
    'expand': Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True),
    'dt_rank': Rule(lambda v: v == 'auto' or is_int(v, 1), "'auto' or an int of at least 1",
                    optional=True),
}


def _check(arch: Mapping[str, Any]) -> None:
    if arch['image_size'] % arch['patch_size']:
        raise ValueError(f"arch['image_size']={arch['image_size']} must be a multiple of "
                         f"arch['patch_size']={arch['patch_size']}")
    if arch.get('expand', 2) * arch['embed_dims'] < 1:
        raise ValueError(f"arch['expand']={arch['expand']!r} leaves no channel")


# --- names of weights -------------------------------------------------------------------------

_KEYS = tuple((name, name) for name in (
    'pos_embed', 'patch_embed.proj', 'time_embed.0', 'time_embed.2', 'label_emb.embedding_table',
    'norm_f', 'final_layer.linear', 'final_layer.adaLN_modulation.1')) + tuple(
    (f'{block}.{part}', f'{block}.{part}') for block in ('in_blocks.#', 'mid_block', 'out_blocks.#')
    for part in ('mixer', 'norm')) + (('out_blocks.#.skip_linear', 'out_blocks.#.skip_linear'),)


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An odd depth has the blocks of the even one below."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, channels, _, patch = shapes['patch_embed.proj.weight']
    depth = 2 * len({m[1] for k in shapes if (m := re.match(r'in_blocks\.(\d+)\.', k))})
    classes = shapes.get('label_emb.embedding_table.weight', (1,))[0] - 1
    num_patches = shapes['pos_embed'][1] - (2 if classes else 1)
    side = round(max(num_patches, 0) ** 0.5)
    if side < 1 or side * side != num_patches:
        raise ValueError('the position embedding is not that of a square')
    outputs, left = divmod(shapes['final_layer.linear.weight'][0], patch * patch * channels)
    if left or outputs not in (1, 2):
        raise ValueError('the last layer does not fit the patches')
    inner, d_state = shapes['mid_block.mixer.A_log']
    _, rank = shapes['mid_block.mixer.dt_proj.weight']
    unusual = dict(
        learn_sigma=outputs == 2, skip='out_blocks.0.skip_linear.weight' in shapes,
        norm='ln' if 'norm_f.bias' in shapes else 'rms', d_state=d_state,
        d_conv=shapes['mid_block.mixer.conv1d.weight'][-1], expand=inner / dims,
        dt_rank='auto' if rank == -(-dims // 16) else rank)
    return dict(embed_dims=dims, depth=depth, patch_size=patch, image_size=side * patch,
                in_channels=channels, num_classes=classes,
                **{k: v for k, v in unusual.items() if v != DEFAULTS[k]})


#: What an arch need not say.
DEFAULTS = dict(learn_sigma=True, skip=True, norm='rms', d_state=16, d_conv=4, expand=2,
                dt_rank='auto')


# --- the official code's numbers ----------------------------------------------------------------

def _parity_subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    # Of one function in fp32, and what is of training or has no effect as published.
    kwargs.ignore('fused_add_norm', 'residual_in_fp32', 'drop_path_rate', 'drop_rate', 'ssm_cfg',
                  'if_cls_token', 'conv', 'initializer_cfg')
    kwargs.require('norm_epsilon', 1e-5)
    patch = kwargs.get('patch_size', 16)
    kwargs.require('stride', patch)
    classes = kwargs.get('num_classes', -1)
    return Subject(Build('vmamba_mm.models:DiS', dict(arch=dict(
        image_size=kwargs.get('img_size', 224), patch_size=patch, depth=kwargs.get('depth', 24),
        embed_dims=kwargs.get('embed_dim', 192), in_channels=kwargs.get('channels', 3),
        num_classes=max(classes, 0), learn_sigma=kwargs.get('learn_sigma', True),
        skip=kwargs.get('skip', True),
        norm='rms' if kwargs.get('rms_norm', True) else 'ln'))), _parity_call)


def _parity_call(case: Options) -> Call:
    inputs = dict(timesteps='timesteps', labels='labels')
    if case.require('kind', 'forward', 'forward_with_cfg') != 'forward_with_cfg':
        return Call(kwargs=inputs)
    return Call(kwargs=dict(inputs, cfg_scale='cfg_scale'), method='forward_with_cfg')


def _parity_mixer(section: str, case: Options) -> Subject:
    return Subject(Build('vmamba_mm.layers:BiMambaMixer', dict(
        embed_dims=case['d_model'], d_state=case['d_state'], d_conv=case['d_conv'],
        expand=case['expand'], reduce='sum')), state='params')


def _parity_diffusion(section: str, case: Options) -> Subject:
    """The times of a sampler, the loss, and samplers with recorded noise."""
    place = 'vmamba_mm.integrations.diffusers.recorded'
    if section == 'training_losses':
        return Subject(Build(f'{place}:training_losses'), Call(
            args=('x_start', 'noise', 't', 'model_output'), outputs=('mean_loss',),
            gradients={'grad_mean_loss_wrt_model_output': 'model_output'}))
    if section == 'spacing':
        return Subject(Build(f'{place}:spacing'), Call(args=()))
    case.ignore('model')  # in words
    return Subject(Build(f'{place}:trajectories', dict(steps=case['steps'])), Call(
        args=('start', 'W', 'noise')))


PARITY = Parity(
    subject=_parity_subject,
    ops={'op_bimamba_v2.pt': _parity_mixer, 'op_diffusion.pt': _parity_diffusion},
    absences=(Omission('grad_x_start', 'the loss is differentiated by the model alone',
                       'op_diffusion.pt'),
              Omission('grad_noise', 'the loss is differentiated by the model alone',
                       'op_diffusion.pt'),
              Omission('gradients', 'has that of the loss by the model', 'op_diffusion.pt')),
    limits=tuple(Limit('*', 1e-5, 'computed in fp32', 'op_diffusion.pt', case)
                 for case in ('training_losses*', 'sampling*')))

_DIRECTION = ('A{}_log', 'D{}', 'conv1d{}.weight', 'x_proj{}.weight', 'dt_proj{}.weight')
FAMILY = Family(
    name='dis', model='DiS', archs=ARCHS, rules=RULES, check=_check, keys=_KEYS, takes='noise',
    signature=('mid_block.mixer.A_b_log', 'mid_block.norm.weight', 'in_blocks.0.norm.weight',
               *(f'mid_block.mixer.{name.format(suffix)}' for suffix in ('', '_b')
                 for name in _DIRECTION if name.format(suffix) != 'A_b_log'),
               'mid_block.mixer.in_proj.weight', 'mid_block.mixer.out_proj.weight',
               'out_blocks.0.norm.weight', 'pos_embed', 'time_embed.0.weight',
               'patch_embed.proj.weight', 'norm_f.weight', 'final_layer.linear.weight'),
    infer_arch=_infer_arch, parity=PARITY, licence='CC-BY-NC-4.0',
    url='https://github.com/feizc/DiS')
