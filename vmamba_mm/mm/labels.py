"""Labels that do not fit their images or the model: one line, before they are trained on."""

import json
import os

import mmcv
import numpy as np

from vmamba_mm.errors import UserError
from vmamba_mm.mm.wrappers import unwrapped

# Whose transforms leave the meaning of a mask's values as it is. A user's own may map them, so
# that what comes before it says little.
STOCK = ('mmcv', 'mmseg', 'mmdet', 'mmpretrain', 'vmamba_mm')
LOOKED_AT = 200  # samples that are looked at before the first is loaded
MOST_LABELS = 100_000  # beyond it reading them would take seconds


def innermost(dataset):
    """The data sets inside all wrappers."""
    inner = getattr(dataset, 'datasets', None)
    if inner is None:
        inner = [dataset.dataset] if hasattr(dataset, 'dataset') else []
    return [leaf for d in inner for leaf in innermost(d)] or [dataset]


# --- masks of semantic segmentation ---------------------------------------------------------------

class CheckMask:
    """A step of a pipeline that refuses a ``gt_seg_map`` which cannot be right.

    Args:
        num_classes: of the model; None for any value.
        ignored: the value of pixels without a label.
        early: whether the mask is as it was loaded, however the image has been resized since.
    """

    def __init__(self, num_classes, ignored, early):
        self.num_classes = num_classes
        self.ignored = ignored
        self.early = early

    def __call__(self, results):
        mask = results.get('gt_seg_map')
        if not isinstance(mask, np.ndarray):
            return results
        path = results.get('seg_map_path')
        if mask.ndim != 2:
            raise UserError(f'the mask {path} is a colour image of shape {mask.shape}: expected '
                            'one channel whose values are class numbers; convert its colours to '
                            'class numbers (a palette PNG is read so by imdecode_backend='
                            "'pillow')")
        if self.early and mask.dtype == np.uint8 and _is_16_bit(path) \
                and (most := int(_read(path).max())) > 255:
            raise UserError(f'the mask {path} has values up to {most} in 16 bits, of which mmseg '
                            'reads 8: expected class numbers below 255; make it anew with 8 bits')
        shapes = [tuple(results['img'].shape[:2])] if 'img' in results else []
        if self.early and 'ori_shape' in results:
            shapes.append(tuple(results['ori_shape'][:2]))
        if shapes and mask.shape not in shapes:
            raise UserError(f'the mask {path} is {_size(mask.shape)} and its image '
                            f'{results.get("img_path")} {_size(shapes[-1])} (width x height): they '
                            'must be of one size; make the mask anew, or resize it without '
                            'interpolation')
        if self.num_classes is not None:
            wrong = (mask >= self.num_classes) & (mask != self.ignored)
            if wrong.any():
                values = ', '.join(map(str, np.unique(mask[wrong])[:5]))
                raise UserError(
                    f'the mask {path} has the value(s) {values} (after reduce_zero_label, where '
                    f'that is on): expected 0 to {self.num_classes - 1} for num_classes='
                    f'{self.num_classes} of the model, and {self.ignored} for pixels without a '
                    'label; change the mask or num_classes')
        return results


def _is_16_bit(path):
    """Whether a PNG says so in its header, which is read in no time beside the image."""
    if not isinstance(path, str) or not path.lower().endswith('.png') or not os.path.isfile(path):
        return False
    with open(path, 'rb') as f:
        return f.read(25)[24:] == b'\x10'


def _read(path):
    return mmcv.imread(path, 'unchanged', backend='pillow')


def _size(shape):
    return f'{shape[1]} x {shape[0]}'


def add_mask_checks(dataset, num_classes, ignored):
    """Check every mask that the pipelines of a data set load, as it is loaded."""
    for inner in innermost(dataset):
        _add_mask_checks(getattr(inner, 'pipeline', None), num_classes, ignored)


def _add_mask_checks(pipeline, num_classes, ignored):
    steps = getattr(pipeline, 'transforms', None)
    if type(pipeline).__name__ != 'Compose' or not isinstance(steps, list) \
            or any(isinstance(step, CheckMask) for step in steps):
        return
    for step in steps:  # such as test-time augmentation, which holds pipelines of its own
        for nested in getattr(step, 'subroutines', None) or ():
            _add_mask_checks(nested, num_classes, ignored)
    loader_indices = [i for i, step in enumerate(steps) if loads_annotations(step)]
    if not loader_indices:
        return
    after = loader_indices[-1] + 1
    early = all(type(step).__module__.partition('.')[0] in STOCK for step in steps[after:])
    steps.insert(after if early else len(steps) - 1, CheckMask(num_classes, ignored, early))


def loads_annotations(step):
    name = type(step).__name__
    return 'Load' in name and 'Annotations' in name


# --- masks of instances ---------------------------------------------------------------------------

class CheckInstances:
    """A step before mmdet's ``LoadAnnotations(with_mask=True)``: every object has its mask."""

    def __init__(self, source):
        self.source = source

    def __call__(self, results):
        missing = sum('mask' not in instance for instance in results.get('instances') or ())
        if missing:
            raise UserError(
                f'{self.source} has no segmentation for {missing} object(s) of the image '
                f'{results.get("img_path")}, and the config asks for masks (with_mask=True, or '
                "metric 'segm'): add the polygons, or train a detector without a mask head")
        return results


def check_instances(dataset, evaluated=False):
    """``evaluated``: whether a metric of masks is computed from the data set."""
    for inner in innermost(dataset):
        pipeline = getattr(inner, 'pipeline', None)
        steps = getattr(pipeline, 'transforms', None)
        steps = steps if isinstance(steps, list) else []
        loader_indices = [i for i, step in enumerate(steps)
                          if loads_annotations(step) and getattr(step, 'with_mask', False) is True
                          and type(step).__name__ == 'LoadAnnotations']
        if not (loader_indices or evaluated) or not hasattr(inner, 'get_data_info'):
            continue
        check = CheckInstances(getattr(inner, 'ann_file', None) or type(inner).__name__)
        for index in range(min(len(inner), LOOKED_AT)):
            check(inner.get_data_info(index))
        if loader_indices and not any(isinstance(step, CheckInstances) for step in steps):
            steps.insert(loader_indices[0], check)


# --- numbers of classes ---------------------------------------------------------------------------

def check_num_classes(model, dataset, place, warn):
    """Compare the classes of a data set with those of the model's heads.

    Args:
        place: of the data set in the config, for the message.
        warn: called with a line about what may be meant so.
    """
    model = unwrapped(model)
    for inner in innermost(dataset):
        info = getattr(inner, 'metainfo', None) or {}
        classes = info.get('thing_classes') or info.get('classes')
        if isinstance(classes, list | tuple):
            check_categories(inner, place, warn)
            _check_detector(model, classes, inner, place)
            _check_classifier(model, classes, place, warn)
        _check_labels(model, inner, place)


def check_categories(dataset, place, warn):
    """A name that a COCO file lacks would shift the numbers of all that follow."""
    category_ids, path = getattr(dataset, 'cat_ids', None), getattr(dataset, 'ann_file', None)
    classes = dataset.metainfo.get('classes')
    if not isinstance(category_ids, list) or not isinstance(path, str) or classes is None:
        return
    if len(category_ids) != len(classes):
        theirs = _categories(path)
        missing = [name for name in classes if name not in theirs]
        raise UserError(
            f'{path} has {len(theirs)} categor{"y" if len(theirs) == 1 else "ies"} '
            f'({_list(theirs)}), and of the {len(classes)} in {place}.metainfo.classes it lacks '
            f"{_list(missing)}: give the file's own names in {place}.metainfo=dict(classes=(...)), "
            'and their number as num_classes of each head')
    left_out = set(getattr(dataset, 'cat_img_map', ())) - set(category_ids)
    if left_out:
        warn(f'{path} has objects of {len(left_out)} categories more than the {len(classes)} in '
             f'{place}.metainfo.classes; they are left out')


def _categories(path):
    try:
        with open(path, encoding='utf-8') as f:
            return [c['name'] for c in json.load(f)['categories']]
    except (OSError, ValueError, KeyError):
        return []


def _list(names):
    names = [str(name) for name in names]
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def _check_detector(model, classes, dataset, place):
    # Heads that compare with words have as many outputs as a sentence may have words.
    if hasattr(model, 'language_model') or not hasattr(dataset, 'cat_ids'):
        return
    for owner in ('', 'roi_head.'):
        for kind in ('bbox_head', 'mask_head'):
            part = getattr(model, 'roi_head', None) if owner else model
            heads = getattr(part, kind, None)
            for head in heads if hasattr(heads, '__iter__') else [heads]:
                number = getattr(head, 'num_classes', None)
                if isinstance(number, int) and number != len(classes) \
                        and not getattr(head, 'class_agnostic', False):
                    raise UserError(
                        f'model.{owner}{kind}.num_classes is {number}, and {place} '
                        f'({getattr(dataset, "ann_file", "")}) has {len(classes)} class(es): '
                        f'{_list(classes)}; set num_classes={len(classes)} in each head, or name '
                        f'{number} in {place}.metainfo=dict(classes=(...))')


def _check_classifier(model, classes, place, warn):
    number = getattr(getattr(model, 'head', None), 'num_classes', None)
    if not isinstance(number, int) or number < 1:
        return
    line = (f'model.head.num_classes is {number}, and {place} has {len(classes)} classes '
            f'({_list(classes)})')
    if len(classes) > number:
        raise UserError(f'{line}: set model.head.num_classes={len(classes)} (and '
                        f'data_preprocessor.num_classes, where the config has it)')
    if len(classes) < number:
        warn(f'{line}: the other outputs will learn nothing')


def _check_labels(model, dataset, place):
    """The labels of an annotation file, which nothing else compares with the classes."""
    number = getattr(getattr(model, 'head', None), 'num_classes', None)
    if not isinstance(number, int) or number < 1 or not hasattr(dataset, 'get_gt_labels') \
            or not 0 < len(dataset) <= MOST_LABELS:
        return
    try:
        labels = np.asarray(dataset.get_gt_labels())
    except Exception:  # a test set without labels, or several for each image
        return
    if labels.ndim == 1 and labels.dtype.kind in 'iu' and \
            not 0 <= labels.min() <= labels.max() < number:
        raise UserError(f'{getattr(dataset, "ann_file", "") or place} has labels from '
                        f'{labels.min()} to {labels.max()}: expected 0 to {number - 1} for '
                        f'model.head.num_classes={number}; change the labels or num_classes')


def segmentation_classes(model):
    """(num_classes, ignore_index) of a segmentor's decode head; (None, 255) of another model."""
    model = unwrapped(model)
    head = getattr(model, 'decode_head', None)
    if hasattr(head, '__iter__'):
        head = list(head)[-1] if len(head) else None
    number = getattr(head, 'num_classes', None)
    if not isinstance(number, int):
        return None, 255
    if getattr(head, 'out_channels', None) == 1:  # one output for two classes
        number = 2
    return number, getattr(head, 'ignore_index', 255)
