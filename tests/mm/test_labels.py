"""Labels that do not fit their images or the model."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from torch import nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.labels import (
    CheckMask,
    add_mask_checks,
    check_instances,
    check_num_classes,
    segmentation_classes,
)


def model_of(**parts):
    """A model with heads that have nothing but these attributes."""
    def build(value):
        if isinstance(value, list):
            return nn.ModuleList(map(build, value))
        module = nn.Module()
        for name, inner in value.items():
            setattr(module, name, build(inner) if isinstance(inner, dict | list) else inner)
        return module
    return build(parts)


# --- masks ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def seg_dataset(mm, tmp_path_factory):
    """seg_dataset(change, *more steps): ADE20K's with the mask of image 3 changed."""
    pytest.importorskip('mmseg')
    from mmengine.registry import init_default_scope
    from mmseg.datasets import ADE20KDataset
    root = tmp_path_factory.mktemp('seg')
    tiny.make_seg(root, count=4)
    path = root / 'annotations/training/3.png'
    sound = path.read_bytes()

    def build(change, *more, load=None, first=()):
        init_default_scope('mmseg')
        path.write_bytes(sound)
        change(path)
        return ADE20KDataset(
            data_root=str(root), pipeline=[
                dict(type='LoadImageFromFile'), *first,
                dict(type='LoadAnnotations', **(load or {})), *more, dict(type='PackSegInputs')],
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'))

    return build


def fill(value):
    def change(path):
        labels = np.array(Image.open(path))
        labels[5, 7] = value
        Image.fromarray(labels).save(path)
    return change


def resize(path):
    Image.open(path).resize((16, 24), 0).save(path)


def sixteen_bits(path):
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 150).save(path)


def sixteen_small_bits(path):
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16)).save(path)


def colour(path):
    Image.open(path).convert('RGB').save(path)


def palette(path):
    image = Image.open(path).convert('P')
    image.putpalette([10, 20, 30] * 256)
    image.save(path)


def nothing(path):
    pass


RESIZE = dict(type='Resize', scale=(48, 48))


@pytest.mark.parametrize(('change', 'message'), [
    (resize, r'3.png is 16 x 24 and its image .*3.jpg 32 x 32'),
    (colour, r'3.png is a colour image of shape \(32, 32, 3\)'),
    (sixteen_bits, '3.png has values up to 300 in 16 bits'),
    (fill(152), r'3.png has the value\(s\) 151 .*0 to 149 for num_classes=150')])
@pytest.mark.parametrize('first', [(), (RESIZE,)], ids=['train', 'test'])
def test_wrong_masks(change, message, first, seg_dataset):
    """Whichever mask it is, and after the image was resized, as in the test pipelines."""
    dataset = seg_dataset(change, first=first)
    for _ in range(2):  # the hook may run twice
        add_mask_checks(dataset, 150, 255)
    assert sum(isinstance(s, CheckMask) for s in dataset.pipeline.transforms) == 1
    for index in range(3):
        dataset[index]
    with pytest.raises(UserError, match=message):
        dataset[3]


@pytest.mark.parametrize(('change', 'more', 'load'), [
    (nothing, (), {}), (palette, (), {}), (sixteen_small_bits, (), {}),
    (fill(0), (), {}), (fill(150), (RESIZE,), {}),
    (nothing, (dict(type='RandomCrop', crop_size=(16, 16)), dict(type='RandomFlip', prob=0.5)),
     dict(reduce_zero_label=True))], ids=range(6))
def test_sound_masks(change, more, load, seg_dataset):
    dataset = seg_dataset(change, *more, load=load)
    add_mask_checks(dataset, 150, 255)
    assert [dataset[i]['data_samples'].gt_sem_seg.data.max() < 256 for i in range(4)] == [True] * 4


class OwnColours:
    """A user's transform: from colours to class numbers."""

    def __call__(self, results):
        if results['gt_seg_map'].ndim == 3:
            results['gt_seg_map'] = results['gt_seg_map'][..., 0]
        return results


def test_masks_that_a_transform_of_the_user_makes_sound(seg_dataset):
    dataset = seg_dataset(colour)
    dataset.pipeline.transforms.insert(2, OwnColours())
    add_mask_checks(dataset, 150, 255)
    assert dataset[3]
    dataset = seg_dataset(resize)
    dataset.pipeline.transforms.insert(2, OwnColours())
    add_mask_checks(dataset, 150, 255)
    with pytest.raises(UserError, match='16 x 24'):
        dataset[3]


def test_classes_of_a_segmentor():
    head = dict(num_classes=11, ignore_index=254, out_channels=11)
    assert segmentation_classes(model_of(decode_head=head)) == (11, 254)
    assert segmentation_classes(model_of(decode_head=[dict(num_classes=3), head])) == (11, 254)
    assert segmentation_classes(model_of(decode_head=dict(num_classes=1, out_channels=1))) \
        == (2, 255)
    assert segmentation_classes(model_of(head=head)) == (None, 255)


# --- COCO ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def coco(mm, tmp_path_factory):
    """coco(change, classes, with_mask): CocoDataset of the annotations as changed."""
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset
    from mmengine.registry import init_default_scope
    root = tmp_path_factory.mktemp('det')
    tiny.make_det(root)
    sound = (root / 'train.json').read_text()

    def build(change=nothing, classes=('box',), with_mask=True):
        init_default_scope('mmdet')
        content = json.loads(sound)
        change(content)
        (root / 'own.json').write_text(json.dumps(content))
        return CocoDataset(
            data_root=str(root), ann_file='own.json', data_prefix=dict(img='images'),
            metainfo=dict(classes=classes), pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=with_mask),
                dict(type='PackDetInputs', meta_keys=())])

    return build


def no_segmentation(content):
    for annotation in content['annotations'][2:]:
        del annotation['segmentation']


def empty_segmentation(content):
    content['annotations'][2]['segmentation'] = []


def second_category(content):
    content['categories'].append(dict(id=2, name='disc'))
    content['annotations'][0]['category_id'] = 2


@pytest.mark.parametrize('change', [no_segmentation, empty_segmentation])
def test_objects_without_masks(change, coco, monkeypatch):
    with pytest.raises(UserError, match=r'own.json has no segmentation for 1 object.*2.jpg'):
        check_instances(coco(change))
    check_instances(coco(change, with_mask=False))
    with pytest.raises(UserError, match='own.json has no segmentation'):
        check_instances(coco(change, with_mask=False), evaluated=True)
    # Beyond those that are looked at before the training.
    monkeypatch.setattr('vmamba_mm.mm.labels.LOOKED_AT', 2)
    dataset = coco(change)
    check_instances(dataset)
    assert dataset[1]
    with pytest.raises(UserError, match='own.json has no segmentation'):
        dataset[2]


def heads(box=1, mask=1, **mask_cfg):
    return model_of(roi_head=dict(bbox_head=[dict(num_classes=box)],
                                  mask_head=dict(num_classes=mask, **mask_cfg)))


@pytest.mark.parametrize(('model', 'change', 'classes', 'message'), [
    (heads(3), nothing, ('box',), r'model.roi_head.bbox_head.num_classes is 3, and train \(.*own'),
    (heads(1, 80), nothing, ('box',), 'model.roi_head.mask_head.num_classes is 80'),
    (heads(1), second_category, ('box', 'disc'), 'has 2 class.*box, disc; set num_classes=2'),
    (model_of(bbox_head=dict(num_classes=80)), nothing, ('box',), 'model.bbox_head.num_classes'),
    (heads(2, 2), nothing, ('box', 'ball'), r'own.json has 1 category \(box\).*lacks ball'),
])
def test_numbers_of_categories(model, change, classes, message, coco):
    with pytest.raises(UserError, match=message):
        check_num_classes(model, coco(change, classes), 'train', pytest.fail)


def test_categories_that_fit(coco):
    said = []
    check_num_classes(heads(), coco(), 'train', pytest.fail)
    check_num_classes(heads(1, 80, class_agnostic=True), coco(), 'train', pytest.fail)
    check_num_classes(model_of(bbox_head=dict(num_classes=256), language_model={}), coco(), 'train',
                      pytest.fail)
    check_num_classes(heads(), coco(second_category), 'train', said.append)
    assert len(said) == 1 and 'objects of 1 categor' in said[0] and 'left out' in said[0]


# --- classification -----------------------------------------------------------------------------

def test_classes_of_a_classifier():
    class Data:
        metainfo = dict(classes=('a', 'b', 'c'))

    said = []
    check_num_classes(model_of(head=dict(num_classes=3)), Data(), 'train', pytest.fail)
    check_num_classes(model_of(head=dict(num_classes=5)), Data(), 'train', said.append)
    assert len(said) == 1 and 'num_classes is 5, and train has 3 classes (a, b, c)' in said[0]
    with pytest.raises(UserError, match='set model.head.num_classes=3'):
        check_num_classes(model_of(head=dict(num_classes=2)), Data(), 'train', pytest.fail)


@pytest.mark.parametrize(('labels', 'wrong'), [([0, 1, 2], False), ([0, 3], True), ([-1, 0], True),
                                               ([[0, 1], [2, 3]], False), ([0.5, 9.0], False)])
def test_labels_of_an_annotation_file(labels, wrong):
    class Data(list):
        ann_file = 'meta/train.txt'

        def get_gt_labels(self):
            return list(self)

    model = model_of(head=dict(num_classes=3))
    if not wrong:
        return check_num_classes(model, Data(labels), 'train', pytest.fail)
    with pytest.raises(UserError, match='meta/train.txt has labels from .* expected 0 to 2'):
        check_num_classes(model, Data(labels), 'train', pytest.fail)
