"""PointMamba (arXiv 2402.10739): its published architectures and the names of its weights.

There are two generations of the public code: the released one, of the paper, follows two Hilbert
curves ('hilbert'); the early one sorts by each axis ('axes').
"""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, is_int, one_of
from vmamba_mm.families.names import rename
from vmamba_mm.families.parity import Build, Call, Limit, Omission, Options, Parity, Subject
from vmamba_mm.families.vivim import count_blocks

#: By name, how often the tokens come in the sequence, each time in another order.
ORDERS = {'hilbert': 2, 'axes': 3}


def _arch(order: str, num_groups: int) -> dict[str, Any]:
    return dict(embed_dims=384, depth=12, num_groups=num_groups, group_size=32, order=order)


#: 64 groups are of 1024 points (ModelNet40, pre-training), 128 of 2048 (ScanObjectNN,
#: ShapeNetPart).
ARCHS = {f'{order}_g{groups}': _arch(order, groups)
         for order in ORDERS for groups in (64, 128)}

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': _INT, 'depth': _INT, 'num_groups': _INT, 'group_size': _INT,
    'order': one_of(*ORDERS),
    # What is published if an arch says nothing.
    'd_state': _INT.or_absent(),
    'norm': one_of('ln', 'rms').or_absent(),
    'cls_token': Rule(lambda v: isinstance(v, bool), 'True or False', optional=True),
}


def _check(arch: Mapping[str, Any]) -> None:
    if arch.get('cls_token') and arch['order'] == 'axes':
        raise ValueError("arch['cls_token']=True goes with order='hilbert' alone")


# --- names of weights -------------------------------------------------------------------------

_EMBED = (*((f'encoder.first_conv.{i}', f'patch_embed.{ours}')
            for i, ours in ((0, 'conv1'), (1, 'norm1'), (3, 'conv2'))),
          *((f'encoder.second_conv.{i}', f'patch_embed.{ours}')
            for i, ours in ((0, 'conv3'), (1, 'norm2'), (3, 'conv4'))))
_KEYS = (
    *_EMBED, ('pos_embed', 'pos_embed'), ('blocks.layers.#', 'blocks.#'),
    ('blocks.norm_f', 'norm_f'), ('norm', 'norm'), ('cls_token', 'cls_token'),
    ('cls_pos', 'cls_pos'),
    *((f'OrderScale_{theirs}_{i + 1}', f'order_scales.{i}.{ours}') for i in range(2)
      for theirs, ours in (('gamma', 'weight'), ('beta', 'bias'))))

#: Linear, batch norm, ReLU and dropout, twice, and the last layer.
_CLASSIFIER = ((0, 'layers.0'), (1, 'layers.1'), (4, 'layers.4'), (5, 'layers.5'), (8, 'fc'))
_HEAD_KEYS = (
    *((f'cls_head_finetune.{i}', f'head.{ours}') for i, ours in _CLASSIFIER),
    ('label_conv', 'decode_head.label_conv'),
    ('propagation_0.mlp_convs.#', 'decode_head.propagation.convs.#'),
    ('propagation_0.mlp_bns.#', 'decode_head.propagation.norms.#'),
    ('convs1', 'decode_head.convs.0'), ('convs2', 'decode_head.convs.1'),
    ('bns1', 'decode_head.norms.0'), ('bns2', 'decode_head.norms.1'),
    ('convs3', 'decode_head.conv_seg'))

#: Of files of masked pre-training, whose backbone lies at 'MAE_encoder.'.
PRETRAIN_KEYS = (
    *((f'MAE_encoder.{theirs}', f'backbone.{ours}') for theirs, ours in _KEYS),
    ('MAE_decoder.blocks.layers.#', 'decoder.blocks.#'),
    ('MAE_decoder.blocks.norm_f', 'decoder.norm_f'), ('MAE_decoder.norm', 'decoder.norm'),
    ('decoder_pos_embed', 'decoder.pos_embed'), ('increase_dim.0', 'decoder.points'),
    ('mask_token', 'mask_token'))


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """How many groups there are and how many points they have leaves no trace."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    dims, _, _ = shapes['patch_embed.conv4.weight']
    _, d_state = shapes['blocks.0.mixer.A_log']
    order = 'hilbert' if 'order_scales.0.weight' in shapes else 'axes'
    if order == 'axes' and 'norm.weight' not in shapes:
        raise ValueError('there is neither an order indicator nor the last norm')
    arch = _arch(order, 64) | dict(embed_dims=dims, depth=count_blocks(shapes))
    if d_state != 16:
        arch['d_state'] = d_state
    if 'norm_f.bias' not in shapes:
        arch['norm'] = 'rms'
    if 'cls_token' in shapes:
        arch['cls_token'] = True
    return arch


# --- the official code's numbers ----------------------------------------------------------------

def _parity_arch(kwargs: Options, sizes: Options, order: str) -> dict[str, Any]:
    """Our ``arch``, of the arguments of a model and those of its encoder."""
    dims = sizes['trans_dim']
    sizes.require('encoder_dims', dims)
    # Nobody reads the heads; all else is of training.
    sizes.ignore('num_heads', 'decoder_num_heads', 'drop_path_rate', 'mask_ratio', 'mask_type')
    kwargs.ignore('num_heads', 'drop_path', 'drop_out', 'drop_path_rate', 'drop_out_in_block')
    arch = dict(embed_dims=dims, depth=sizes['depth'], order=order,
                num_groups=kwargs.get('num_group', 128), group_size=kwargs.get('group_size', 32))
    if kwargs.get('rms_norm', False):
        arch['norm'] = 'rms'
    if order == 'hilbert' and kwargs.get('use_cls_token', False):
        arch['cls_token'] = True
    elif order == 'axes':
        kwargs.require('use_cls_token', False)
    return arch


def _parity_subject(file: str, options: Options) -> Subject:
    """A classifier, a masked pre-training or a segmentation of parts, in the order of the batch
    that the public code has."""
    kwargs = options['kwargs']
    kind = options['cls']
    if kind == 'part segmentation get_model':
        arch = _parity_arch(kwargs, kwargs, 'axes')
        return Subject(Build('vmamba_mm.heads:PointSegmentor', dict(
            backbone=_parity_backbone(arch, tuple(kwargs['fetch_idx'])),
            decode_head=Build('vmamba_mm.heads:PartSegHead', dict(
                in_channels=[arch['embed_dims']] * len(kwargs['fetch_idx']),
                num_classes=options['num_parts'])))),
            Call(args=('input', 'cls_label_one_hot'), run=_run_segmentor))
    if 'group' not in kwargs and 'loss' in kwargs:
        order = 'hilbert' if 'mamba_config' in kwargs else 'axes'
        sizes = kwargs['mamba_config' if order == 'hilbert' else 'transformer_config']
        arch = _parity_arch(kwargs, sizes, order)
        return Subject(
            Build('vmamba_mm.heads:MaskedPointMamba', dict(
                backbone=_parity_backbone(arch, None), decoder_depth=sizes['decoder_depth'],
                loss=kwargs['loss'])),
            Call(args=('input', 'mask'), kwargs={'order_index': 'order_index'}, run=_run_masked),
            convert=convert_pretrained, within=('base_model',))
    order = {'PointMambaScan': 'hilbert', 'PointMamba': 'axes'}[kind]
    arch = _parity_arch(kwargs, kwargs, order)
    pool = 'avg'
    if order == 'hilbert':
        wanted = [name for name in ('avg', 'max') if kwargs.get(f'{name}_head', False)]
        pool = 'cls+avg' if arch.get('cls_token') else '+'.join(wanted)
    return Subject(
        Build('vmamba_mm.heads:PointClassifier', dict(
            backbone=_parity_backbone(arch, None),
            head=Build('vmamba_mm.heads:PointHead', dict(
                in_channels=arch['embed_dims'], num_classes=kwargs['cls_dim'], pool=pool)))),
        Call(run=_run_classifier))


def _parity_backbone(arch: dict[str, Any], out_indices: tuple[int, ...] | None) -> Build:
    more = dict(curve_depth='batch') if arch['order'] == 'hilbert' else {}
    return Build('vmamba_mm.models:PointMamba', dict(
        arch=arch, out_type='raw', out_indices=out_indices, **more))


def convert_pretrained(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a masked pre-training by our names.

    Raises:
        LookupError: on a name that none has.
    """
    return {rename(key.removeprefix('module.'), PRETRAIN_KEYS): value
            for key, value in state.items()}


def _grouping(model: Any, points: Any) -> dict[str, Any]:
    """The numbers of centres and neighbours, and the orders."""
    backbone = model.backbone
    groups = backbone.group(points)
    results = dict(fps_idx=groups.centre_indices, knn_idx=groups.indices)
    if backbone.arch['order'] == 'axes':
        orders = backbone.orders(groups.centres).unbind(1)
        return results | dict(order=dict(zip('xyz', orders, strict=True)))
    curves = {}
    for name, curve in backbone.curves(groups.centres).items():
        depth = int(curve.depth[0])
        batch, count = curve.order.shape
        sample = (curve.order.new_ones(batch).cumsum(0) - 1).unsqueeze(1)
        curves[name] = dict(
            grid_coord=curve.cells, depth=depth, code=curve.code | sample << 3 * depth,
            order_local=curve.order, order_flat=curve.order + count * sample)
    return results | dict(serialization=curves)


def _run_classifier(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    seen = {}
    hooks = [model.backbone.get_submodule(path).register_forward_hook(
        lambda module, args, output, name=name: seen.update({name: output}))
        for name, path in dict(encoder_tokens='patch_embed', blocks_output='norm_f').items()]
    try:
        output = model(inputs['input'])
    finally:
        for hook in hooks:
            hook.remove()
    return dict(output=output, **seen, **_grouping(model, inputs['input']))


def _run_segmentor(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    seen = {}
    hook = model.decode_head.propagation.register_forward_hook(
        lambda module, args, output: seen.update(propagated=output[:, ::16]))
    points = inputs['input'].transpose(1, 2)
    try:
        output = model(points, inputs['cls_label_one_hot'])
    finally:
        hook.remove()
    found = _grouping(model, points)
    return dict(output=output.log_softmax(-1), fps_idx=found['fps_idx'], **seen)


def _run_masked(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    index = inputs.get('order_index')
    found = model.rebuild(inputs['input'], inputs['mask'], index)
    return dict(output=model.distance(found), x_vis=found.visible,
                rebuilt=found.points.flatten(0, 1), **_grouping(model, inputs['input']))


def _parity_points(section: str, case: Options) -> Subject:
    """The curves, the choice of points, or the distance of clouds."""
    if section == 'unit_cell_codes_by_depth':
        case.require('cells', '(1,0,0),(0,1,0),(0,0,1)')
    target, call = {
        'hilbert': ('hilbert_code', Call(args=('grid_coord', 'batch', 'depth'), run=_run_curves)),
        'unit_cell_codes_by_depth': ('hilbert_code', Call(
            args=(), run='vmamba_mm.testing:run_unit_cells')),
        'fps_knn': ('group_points', Call(args=('points', 'num', 'k'),
                                         outputs=('fps_idx', 'knn_idx'))),
        'chamfer': ('chamfer_distance', Call(
            args=('a', 'b'), run='vmamba_mm.testing:run_chamfer'))}[section]
    return Subject(Build(f'vmamba_mm.ops.points:{target}'), call)


def _run_curves(code: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    cells, depth, results = inputs['grid_coord'], inputs['depth'], {}
    for name, axes in (('hilbert', [0, 1, 2]), ('hilbert-trans', [1, 0, 2])):
        results[name] = code(cells[..., axes], depth)
        results[f'{name}+batch'] = results[name] | inputs['batch'] << 3 * depth
    return results


PARITY = Parity(
    subject=_parity_subject, ops={'op_points.pt': _parity_points},
    absences=(Omission('grad_cls_label_one_hot', 'of the category none is stored', 'partseg*'),
              Omission('grad_input', 'is that of a loss of the points themselves', 'mae_*'),
              Omission('gradients', 'of the Chamfer distance they have names of their own',
                       'op_points.pt')),
    limits=(Limit('grad_input', 0.15, 'the stored one, of expanded squares under 1 / (d + 1e-8), '
                  'is 8e-2 off that of fp64', 'partseg*'),
            Limit('grad_params*', 5e-3, 'of the same expanded squares', 'partseg*'),
            Limit('cdl*', 1e-6, 'computed in fp32', 'op_points.pt')))

_MIXER = ('A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight',
          'dt_proj.weight', 'dt_proj.bias', 'out_proj.weight')
FAMILY = Family(
    name='pointmamba', model='PointMamba', takes='points', archs=ARCHS, rules=RULES, check=_check,
    keys=_KEYS, head_keys=_HEAD_KEYS,
    signature=('patch_embed.conv1.weight', 'patch_embed.conv4.weight',
               'patch_embed.norm2.running_mean', 'pos_embed.0.weight', 'pos_embed.2.weight',
               'norm_f.weight', 'blocks.0.norm.weight',
               *(f'blocks.0.mixer.{name}' for name in _MIXER)),
    first_convs=('patch_embed.conv1.weight',), infer_arch=_infer_arch, weights_key='base_model',
    parity=PARITY, licence='Apache-2.0', url='https://github.com/LMD0311/PointMamba')
