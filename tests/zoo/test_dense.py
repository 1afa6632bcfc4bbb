"""Detection and segmentation with official files: convert there and back, evaluate."""

import json
import pickle

import numpy as np
import pytest
import torch
from official import shared
from zoo_helpers import assert_detections, metric


def round_trip(one, run, folder):
    """Convert the official file to ours, back, and again; returns ours."""
    ours, back, again = (folder / f'{name}.pth' for name in ('ours', 'back', 'again'))
    run('convert_checkpoint.py', one.file, ours)
    run('convert_checkpoint.py', ours, back, '--to', 'official')
    run('convert_checkpoint.py', back, again)
    for path, expected in ((ours, one.model.state_dict()), (back, one.newest),
                           (again, one.model.state_dict())):
        content = torch.load(path, weights_only=True)
        assert list(content) == ['meta', 'state_dict']
        assert content['meta']['dataset_meta'] == one.content['meta']['dataset_meta']
        found = content['state_dict']
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    return ours


@pytest.mark.slow
def test_mask_rcnn_converts_and_evaluates(dense, run, big):
    """Two photographs of fruits with COCO's 80 categories around theirs.

    The model's best box in each is added as an object, so that something is found.
    """
    root = shared('data/fruits_nuts')
    one = dense('det')
    ours = round_trip(one, run, big)

    classes = one.content['meta']['dataset_meta']['classes']
    assert len(classes) == 80
    data = json.loads((root / 'annotations/instances_val.json').read_text())
    data['images'] = data['images'][:2]
    ids = [image['id'] for image in data['images']]
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] in ids]
    for annotation in data['annotations']:
        name = ('apple', 'orange', 'banana')[annotation['category_id'] - 1]
        annotation['category_id'] = classes.index(name) + 1
    predictions = [one.predict(root / 'val' / image['file_name'], (400, 300)).pred_instances
                   for image in data['images']]
    for number, (i, expected) in enumerate(zip(ids, predictions, strict=True)):
        x, y, x2, y2 = expected.bboxes[0].tolist()
        data['annotations'].append(dict(
            id=10000 + number, image_id=i, category_id=expected.labels[0].item() + 1, iscrowd=0,
            bbox=[x, y, x2 - x, y2 - y], area=(x2 - x) * (y2 - y),
            segmentation=[[x, y, x2, y, x2, y2, x, y2]]))
    data['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    ann_file = big / 'instances.json'
    ann_file.write_text(json.dumps(data))

    def evaluate(checkpoint):
        dataset, out = 'test_dataloader.dataset', big / f'{checkpoint.stem}.pkl'
        text, _ = run('test.py', one.config, checkpoint, '--out', out, '--cfg-options',
                      f'{dataset}.data_root={root}', f'{dataset}.ann_file={ann_file}',
                      f'{dataset}.data_prefix.img=val', f'{dataset}.pipeline.1.scale=(400,300)',
                      f'test_evaluator.ann_file={ann_file}', 'test_dataloader.num_workers=0')
        metrics = [metric(text, f'coco/{kind}_mAP') for kind in ('bbox', 'segm')]
        return metrics, [sample['pred_instances'] for sample in pickle.loads(out.read_bytes())]

    metrics, found = evaluate(one.file)
    assert metrics[0] > 0.1
    assert len(found) == 2
    for instances, expected in zip(found, predictions, strict=True):
        assert_detections(instances, expected)
    assert expected.labels.unique().numel() > 3

    same_metrics, again = evaluate(ours)
    assert same_metrics == metrics
    for a, b in zip(found, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ('labels', 'scores', 'bboxes'))
        assert a['masks'] == b['masks']


@pytest.mark.slow
def test_upernet_converts_and_evaluates(dense, run, big):
    from PIL import Image

    root = shared('data/camvid')
    one = dense('seg')
    ours = round_trip(one, run, big)

    def evaluate(checkpoint, maps):
        dataset = 'test_dataloader.dataset'
        out, _ = run('test.py', one.config, checkpoint, '--out', maps, '--cfg-options',
                     f'{dataset}.data_root={root}', f'{dataset}.indices=2',
                     f'{dataset}.pipeline.1.scale=(256,192)', 'test_dataloader.num_workers=0')
        return [metric(out, name) for name in ('mIoU', 'mAcc', 'aAcc')]

    metrics = evaluate(one.file, big / 'maps')
    assert min(metrics) > 0
    assert metrics == evaluate(ours, big / 'maps2')
    paths = sorted((big / 'maps').iterdir())
    assert len(paths) == 2
    for path in paths:
        found = np.array(Image.open(path))
        assert np.array_equal(found, np.array(Image.open(big / 'maps2' / path.name)))
        image = root / 'images/validation' / f'{path.stem}.jpg'
        expected = one.predict(image, (256, 192)).pred_sem_seg.data[0].numpy()
        assert found.shape == expected.shape and len(np.unique(expected)) > 3
        assert (found - 1 == expected).mean() > 0.99  # 0 is 'unlabelled' in ADE20K's files
