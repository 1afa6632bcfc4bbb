"""Counting the parameters and FLOPs of a model of mmpretrain, mmdet or mmseg, for get_flops.py.

``torch.utils.flop_counter`` counts matrix products and convolutions from shapes, and our ops by
the formulas that they register. On the meta device nothing is computed: a base model at 1280x800
takes a second. A multiply-add counts as 1 here.
"""

import functools
import inspect
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vmamba_mm.ops  # noqa: F401 (registers the formulas)
from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch
from vmamba_mm.mm.cli.configs import datasets_of, find_task
from vmamba_mm.mm.cli.runs import model_settings, sync_to_plain_batch_norm
from vmamba_mm.mm.sources import VIDEO
from vmamba_mm.ops.selective_scan.op import scan_flops

KINDS = ('scan', 'attention', 'projections', 'convolutions', 'MLP')
EXTRAS = ('norms', 'resizes', 'pooling')

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution, aten._convolution)
_BATCHED = (aten.bmm, aten.baddbmm)
# Scans that project their inputs themselves. All that other ops of ours calculate counts as scan.
_PROJECTING = tuple(getattr(torch.ops.vmamba_mm, f'{prefix}{name}') for prefix in ('', '_')
                    for name in ('ss2d_scan_fwd', 'ss2d_scan_norm'))
_MLP = re.compile('mlp|ffn', re.IGNORECASE)
_FREE = ('RoIAlign', 'SyncBatchNorm')  # of mmcv.ops: no products, as no counter counts them


@dataclass
class Row:
    """A part of a model, or, with a ``kind``, what those ops cost in it; in multiply-adds."""

    part: str
    kind: str
    parameters: int | None
    flops: int


@dataclass
class Count:
    """The FLOPs and parameters of a model on one image of ``shape`` (H, W).

    ``extras`` is what the counters of fvcore and mmengine, the authors' ones, add to products and
    convolutions: 5 for each element of a layer or group norm, 2 of a batch norm, 4 and 1 for each
    element that bilinear and nearest resizing make, 1 for each that is pooled.
    """

    shape: tuple[int, int]
    parameters: int
    rows: list[Row]
    extras: dict[str, int]
    notes: list[str]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows if not row.kind)


def count(cfg, shape=None, device=None):
    """Count a config's model on one image; of videos, on one clip of the test pipeline's frames.

    Args:
        cfg: the config, as of :func:`vmamba_mm.mm.cli.load_config`.
        shape: (H, W) of the image, by default that of the task's published numbers, of a classifier
            that of its arch if it says one; a detector's is padded as its data_preprocessor says.
        device: where to count, as 'cpu'; by default on meta, and on a CPU where that fails.

    Raises:
        UserError: if the model does not run on such an image, or is of no task and has no shape.
    """
    task = find_task(cfg)
    if shape is None and (task is None or task.image is None):
        raise UserError(f'{cfg.filename} is of no task whose images have a usual size: give it by '
                        '--shape')
    shape = tuple(shape or task.name in ('cls', 'video') and find_image_size(cfg) or task.image)
    forward = _FORWARDS.get(task and task.name, _forward_tensor)
    if task is not None and task.source is VIDEO:
        forward = functools.partial(_forward_clip, _num_frames(cfg))
    # The first is enough for ours; constructors of others read values, and some models when run.
    attempts = (('meta', 'meta'), ('cpu', 'meta'), ('cpu', 'cpu'))
    for built_on, counted_on in attempts if device is None else ((device, device),):
        try:
            model = _build(cfg, built_on)
        except Exception:  # a third party's, as below
            if built_on == attempts[-1][0]:
                raise
            continue
        try:
            result = _measure(model.to(counted_on), forward, shape, find_channels(cfg, model))
        except Exception as err:
            failure = err
            continue
        if device is None and counted_on == 'cpu':
            result.notes.append('run on the CPU, as the meta device does not do: '
                                f'{type(failure).__name__}')
        return result
    raise UserError(f'the model cannot be run on an image of {shape[0]}x{shape[1]}: '
                    f'{type(failure).__name__}: {failure}') from failure


def find_image_size(cfg):
    """(H, W) of the images that a config's arch is made for; None if it says none."""
    from mmengine.registry import MODELS

    settings = cfg.model.get('backbone') or {}
    backbone = MODELS.get(settings.get('type')) if isinstance(settings.get('type'), str) else None
    if not hasattr(backbone, 'family'):
        return None
    arch = resolve_arch(backbone.family, settings.get('arch') or backbone.default_arch)
    size = arch.get('image_size')
    return (size, size) if isinstance(size, int) else size


def count_module(model, shape):
    """Count a plain module, (1, 3, H, W) to anything, on its device, in evaluation mode."""
    return _measure(model.eval(), lambda model, x, notes: model(x), shape)


def find_channels(cfg, model):
    """The number of channels that the images of a config's model have.

    The backbone's ``in_channels`` as configured or by default; else those of its first
    convolution, unless the test pipeline reads photographs, which have 3.
    """
    backbone = getattr(model, 'backbone', model)
    settings = cfg.model.get('backbone') or cfg.model
    for name in ('in_channels', 'in_chans'):
        default = inspect.signature(type(backbone)).parameters.get(name)
        channels = settings.get(name, getattr(default, 'default', None))
        if isinstance(channels, int):
            return channels
    first = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    # A first step may put neighbouring pixels into channels, as YOLOX does: 12 of 3.
    return 3 if first > 3 and reads_colours(cfg) else first


def reads_colours(cfg):
    """Whether the test pipeline reads photographs; None if it loads nothing that is known."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    loaders = [step for _, inner in (datasets_of(dataset, '') if dataset else ())
               for step in inner.get('pipeline') or () if type_name(step).startswith('Load')
               and 'Annotations' not in type_name(step)]
    return None if not loaders else all(
        type_name(step) == 'LoadImageFromFile'
        and step.get('color_type', 'color').startswith('color')
        and step.get('imdecode_backend') != 'tifffile' for step in loaders)


def _measure(model, forward, shape, channels=3):
    """Count forward(model, x, notes) on the model's device."""
    notes, device = [], next(model.parameters()).device
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1)
    if forward is _detect and any(size % divisor for size in shape):
        shape = tuple(-(-size // divisor) * divisor for size in shape)
        notes.append(f'the image is padded to {shape[0]}x{shape[1]}')
    whole = _Whole(model, forward, notes)
    # Fused attention has a formula for some devices only; as products it counts everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter, \
            FlopCounterMode(display=False, custom_mapping=_formulas()) as extra_counter:
        whole(torch.empty(1, channels, *shape, device=device))
    counts, extra_counts = counter.get_flop_counts(), extra_counter.get_flop_counts()
    missing = sorted({type(m).__name__ for m in model.modules()
                      if type(m).__module__.startswith('mmcv.ops')}.difference(_FREE))
    if missing:
        notes.append('not counted, for lack of a formula: what mmcv itself computes in '
                     + ', '.join(missing))
    rows = _rows(model, counts, extra_counts)
    result = Count(shape, sum(p.numel() for p in model.parameters()), rows, _extras(extra_counts),
                   notes)
    # A model that uses its modules past their forward would lose its parts without a word.
    left = sum(counts.get('Global', {}).values()) // 2 - result.flops
    if left:  # parts that call the same module, as decoder and head of a DETR, both have its FLOPs
        rows.append(Row('other' if left > 0 else 'in two of these', '', None, left))
    return result


def _build(cfg, device):
    """The model with whatever weights, in evaluation mode."""
    from mmengine.registry import MODELS, DefaultScope

    settings = model_settings(cfg)
    sync_to_plain_batch_norm(settings)
    if isinstance(settings.get('train_cfg'), dict):
        for key in ('augments', 'probs'):  # mixup, of which the preprocessor would speak
            settings['train_cfg'].pop(key, None)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'), \
            warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter('ignore')
        return MODELS.build(settings).eval()


class _Whole(nn.Module):
    """A model and what is counted of it, as one module: torch counts by the names of modules."""

    def __init__(self, model, forward, notes):
        super().__init__()
        self.model, self.run_model, self.notes = model, forward, notes

    def forward(self, x):
        return self.run_model(self.model, x, self.notes)


# --- all that a model does for an image, up to what needs the values of its predictions ---------

def _forward_tensor(model, x, notes):
    return model(x, mode='tensor')


def _forward_clip(num_frames, model, x, notes):
    notes.append(f'one clip of {num_frames} frames')
    return model(x[:, :, None].expand(-1, -1, num_frames, -1, -1), mode='tensor')


def _num_frames(cfg):
    """Of the clips that the test pipeline loads."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    for _, inner in datasets_of(dataset, '') if dataset else ():
        for step in inner.get('pipeline') or ():
            if type_name(step) == 'LoadClips':
                return step.num_frames
    raise UserError(f'{cfg.filename} has no test_dataloader whose pipeline says how many frames a '
                    "clip has: it needs the step 'vmamba_mm.LoadClips'")


def _segment(model, x, notes):
    if not hasattr(model, 'decode_head'):
        return _forward_tensor(model, x, notes)
    shape = x.shape[2:]
    needed = [p for p in inspect.signature(model.decode_head.forward).parameters.values()
              if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    if isinstance(model.decode_head, nn.ModuleList) or len(needed) > 1:
        return model.encode_decode(x, [dict(img_shape=shape, pad_shape=shape, ori_shape=shape)])
    return model.decode_head(model.extract_feat(x))  # past forward() torch knows no module


def _detect(model, x, notes):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    shape = tuple(x.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape,
                                         batch_input_shape=shape, scale_factor=(1.0, 1.0)))
    if not (getattr(model, 'with_rpn', False) and getattr(model, 'with_roi_head', False)):
        return model(x, [sample], mode='tensor')
    features = model.extract_feat(x)
    model.rpn_head(features)
    extractors = {}
    for parent in list(model.roi_head.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, 'roi_layers'):
                extractors[name] = _RoIShapes(child)
                parent.add_module(name, extractors[name])
    boxes = x.new_zeros(model.rpn_head.test_cfg.get('max_per_img', 1000), 4)
    model.roi_head(features, [InstanceData(bboxes=boxes)], [sample])
    notes.append('regions: ' + ', '.join(f'{name} {extractor.seen}'
                                         for name, extractor in extractors.items()))


#: The name of a task -> how its models run; those of others take an image in mode 'tensor'.
_FORWARDS = {'det': _detect, 'seg': _segment}


class _RoIShapes(nn.Module):
    """Stands for a RoI extractor, which samples without products: the shape of its result."""

    def __init__(self, extractor):
        super().__init__()
        self.num_inputs, self.out_channels = extractor.num_inputs, extractor.out_channels
        self.size, self.seen = extractor.roi_layers[0].output_size, 0

    def forward(self, features, rois, *args, **kwargs):
        self.seen = len(rois)
        return features[0].new_zeros(len(rois), self.out_channels, *self.size)


# --- formulas ---------------------------------------------------------------------------------
# For torch, a multiply-add is 2; so everything here is doubled, and halved with the rest.

def _formulas():
    """Formulas for what the authors' counters add, and for scans without their projections."""
    packets_of = {
        _layer_norm: (aten.native_layer_norm, aten.native_group_norm),
        _batch_norm: (aten.native_batch_norm, aten._native_batch_norm_legit_no_training),
        _bilinear: (aten.upsample_bilinear2d,), _nearest: (aten.upsample_nearest2d,),
        _pooling: (aten._adaptive_avg_pool2d, aten.mean),  # mean where one pixel is left
        _scan_alone: _PROJECTING}
    # A packet alone is counted after PyTorch has decomposed it, which leaves nothing of some.
    return {key: formula for formula, packets in packets_of.items() for packet in packets
            for key in (packet, packet.default)}


def _layer_norm(x_shape, *args, out_shape=None, **kwargs):
    return 2 * 5 * math.prod(x_shape)


def _batch_norm(x_shape, *args, out_shape=None, **kwargs):
    return 2 * 2 * math.prod(x_shape)


def _bilinear(*args, out_shape=None, **kwargs):
    return 2 * 4 * math.prod(out_shape)


def _nearest(*args, out_shape=None, **kwargs):
    return 2 * math.prod(out_shape)


def _pooling(x_shape, *args, out_shape=None, **kwargs):
    return 2 * math.prod(x_shape)


def _scan_alone(x_shape, x_proj_shape, dt_projs_shape, bias_shape, A_shape, *args, out_shape=None,
                **kwargs):
    """9 B L D N + B L D, with the D of all routes (arXiv 2401.10166, section 4.1)."""
    return scan_flops(x_shape[0], A_shape[0], math.prod(x_shape[2:]), A_shape[1])


def _extras(extra_counts):
    names = dict(zip((_layer_norm, _batch_norm, _bilinear, _nearest, _pooling),
                     ('norms', 'norms', 'resizes', 'resizes', 'pooling'), strict=True))
    extras = dict.fromkeys(EXTRAS, 0)
    formulas = _formulas()
    for op, flops in extra_counts.get('Global', {}).items():
        if formulas.get(op) in names:
            extras[names[formulas[op]]] += flops // 2
    return extras


# --- parts ------------------------------------------------------------------------------------

def _rows(model, counts, extra_counts):
    """The backbone by kind of op, other parts as wholes."""
    rows = []
    for name, part in model.named_children():
        path = f'{_Whole.__name__}.model.{name}'
        children = [(f'{name}.{n}', m, f'{path}.{n}') for n, m in part.named_children()
                    if name == 'roi_head']
        for label, module, at in children or [(name, part, path)]:
            parameters = sum(p.numel() for p in module.parameters())
            flops = _called(module, at, counts) // 2
            if not parameters and not flops:
                continue
            rows.append(Row(label, '', parameters, flops))
            by_kind = _by_kind(module, at, counts, extra_counts) if name == 'backbone' else {}
            rows += [Row(label, k, None, by_kind[k] // 2) for k in KINDS if by_kind.get(k)]
    return rows


def _called(module, path, counts):
    """FLOPs of a module or, where its forward was never called (lists), of those inside."""
    if path in counts:
        return sum(counts[path].values())
    return sum(_called(child, f'{path}.{name}', counts)
               for name, child in module.named_children())


def _by_kind(module, path, counts, extra_counts):
    """{kind: FLOPs as torch counts them} of a module that has the path in the counts."""
    by_kind, inside = Counter(), None
    for op, flops in counts.get(path, {}).items():
        if op in _PROJECTING:
            by_kind['scan'] += extra_counts[path][op]
            by_kind['projections'] += flops - extra_counts[path][op]
        else:
            by_kind[_kind(op)] += flops
    for name, child in module.named_modules():
        if not name or inside and name.startswith(inside):
            continue
        child_counts = counts.get(f'{path}.{name}', {})
        if getattr(child, 'projects_in_batches', False):
            for op in _BATCHED:  # without those of what is inside, which counts by itself
                own = child_counts.get(op, 0) - sum(
                    counts.get(f'{path}.{name}.{inner}', {}).get(op, 0)
                    for inner, _ in child.named_children())
                by_kind[_kind(op)] -= own
                by_kind['projections'] += own
            continue
        if _MLP.search(type(child).__name__):
            inside, kind = f'{name}.', 'MLP'
        elif isinstance(child, nn.Linear):  # batched or not, by its strides
            kind = 'projections'
        else:
            continue
        for op, flops in child_counts.items():
            by_kind[_kind(op)] -= flops
            by_kind[kind] += flops
    return by_kind


def _kind(op):
    if str(op).startswith('vmamba_mm.'):
        return 'scan'
    return ('convolutions' if op in _CONVOLUTIONS else 'attention' if op in _BATCHED
            else 'projections')
