"""The demo sets: real layouts, exact labels, held-out digits, the same bytes for the same seed."""
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image
from running import loading_tools

for package in ('mlxtend', 'skimage', 'sklearn', 'pycocotools'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'demo')", allow_module_level=True)


#: The sets of volumes and of pairs have tests of their own.
PARTS = 'imagenet', 'coco', 'ade20k', 'clips'


@pytest.fixture(scope='module')
def make_data():
    with loading_tools() as load:
        yield load('demo/make_data.py')


@pytest.fixture(scope='module')
def settings(make_data):
    return {**make_data.DEFAULTS, 'cls_per_class': (4, 2), 'scenes': (8, 3),
            'clips_per_class': (4, 2)}


@pytest.fixture(scope='module')
def root(make_data, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    make_data.build(path, settings, PARTS)
    return path


def pixels(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*'))
            if p.is_file()}


def test_imagenet_layout(root, make_data):
    names = sorted(make_data.scenes.CLASSES)
    for split, count in (('train', 4), ('val', 2)):
        folders = sorted(p.name for p in (root / 'imagenet' / split).iterdir())
        assert folders == names
        for name in names:
            assert len(list((root / 'imagenet' / split / name).glob('*.png'))) == count


def test_coco_reads_back(root, settings):
    from pycocotools.coco import COCO
    size = settings['scene_size']
    for split, count in (('train', 8), ('val', 3)):
        coco = COCO(root / 'coco' / 'annotations' / f'instances_{split}2017.json')
        assert len(coco.getImgIds()) == count and len(coco.getCatIds()) == 10
        for image in coco.loadImgs(coco.getImgIds()):
            with Image.open(root / 'coco' / f'{split}2017' / image['file_name']) as file:
                assert file.size == (image['width'], image['height']) == (size, size)
            for ann in coco.loadAnns(coco.getAnnIds(image['id'])):
                ys, xs = np.nonzero(coco.annToMask(ann))
                assert ann['area'] == len(ys)
                assert ann['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_ade20k_labels_are_the_coco_masks(root, make_data):
    from pycocotools.coco import COCO
    coco = COCO(root / 'coco' / 'annotations' / 'instances_train2017.json')
    for image in coco.loadImgs(coco.getImgIds()):
        labels = np.asarray(Image.open(root / 'ade20k' / 'annotations' / 'training'
                                       / image['file_name']))
        expected = np.zeros_like(labels)
        for ann in coco.loadAnns(coco.getAnnIds(image['id'])):
            expected[coco.annToMask(ann) == 1] = ann['category_id']
        assert (labels[expected > 0] == expected[expected > 0]).all()
        # elsewhere: the photograph, or 0 on the rim where ink and photograph blend
        rest = labels[expected == 0]
        assert set(np.unique(rest)) == {0, make_data.PHOTO_LABEL}
        assert (rest == 0).mean() < 0.2


def test_masks_are_the_pasted_ink(make_data):
    scenes = make_data.scenes
    sources = scenes.digit_ids('train')[[0, 900, 2500]]
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    image, digits, rim = scenes.make_scene(rng, 'train', 128, sources, (34, 64))
    bare, _, _ = scenes.make_scene(again, 'train', 128, [], (34, 64))
    change = (image.astype(int) - bare).max(2)
    ink = np.zeros((128, 128), bool)
    for digit, source in zip(digits, sources, strict=True):
        assert digit.label == scenes.load_digits()[1][source]
        assert change[digit.mask].mean() > 60
        assert not (ink & digit.mask).any()
        ink |= digit.mask
    # Outside nothing gets lighter, but for 10 % of opacity and the noise of both pictures.
    assert change[~ink & ~rim].max() <= 25 + 6 * 3 * 2


def test_validation_is_held_out(root, make_data):
    scenes = make_data.scenes
    train, val = scenes.digit_ids('train'), scenes.digit_ids('val')
    assert len(train) == 4000 and len(val) == 1000 and not set(train) & set(val)
    assert not set(scenes.PHOTOS['train']) & set(scenes.PHOTOS['val'])
    digits = scenes.load_digits()[0]
    assert not {d.tobytes() for d in digits[train]} & {d.tobytes() for d in digits[val]}
    data = json.loads((root / 'coco' / 'annotations' / 'instances_val2017.json').read_text())
    assert {ann['source_digit'] for ann in data['annotations']} <= set(val.tolist())


def test_same_seed_same_bytes(root, make_data, settings, tmp_path):
    make_data.build(tmp_path / 'same', settings, PARTS)
    assert pixels(tmp_path / 'same') == pixels(root)
    make_data.build(tmp_path / 'other', {**settings, 'seed': 1}, PARTS)
    assert pixels(tmp_path / 'other') != pixels(root)


def test_kept_when_complete_and_remade_when_not(make_data, settings, tmp_path, capsys):
    make_data.build(tmp_path, settings, ['imagenet'])
    image = tmp_path / 'imagenet' / 'val' / 'one' / 'mark.txt'
    image.write_text('still here')
    make_data.build(tmp_path, settings, ['imagenet'])
    assert image.is_file() and 'already' in capsys.readouterr().out
    (tmp_path / 'imagenet' / 'made.json').unlink()  # as after an interrupted build
    make_data.build(tmp_path, settings, ['imagenet'])
    assert not image.is_file()
    assert not (tmp_path / 'coco').exists()


def test_a_wrong_label_is_found(make_data, settings, tmp_path):
    make_data.build(tmp_path, settings, ['coco'])
    path = tmp_path / 'ade20k' / 'annotations' / 'training' / '000000.png'
    labels = np.asarray(Image.open(path)).copy()
    labels[labels == make_data.PHOTO_LABEL] = 1
    Image.fromarray(labels).save(path)
    with pytest.raises(SystemExit, match='differ'):
        make_data.verify_scenes(tmp_path / 'coco', tmp_path / 'ade20k', settings)


def test_missing_package_is_one_line(make_data):
    with pytest.raises(SystemExit, match="'no_such_package' is not installed"):
        make_data.scenes.package_file('no_such_package', 'x')
