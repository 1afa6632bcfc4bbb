"""Build the demo sets, in real layouts: MNIST digits, alone and pasted on photographs, made-up
heads, pairs of photographs, photographs alone, captions, and clouds of points.

    data/demo/imagenet   train/<class>/*.png, val/<class>/*.png             (ImageNet folders)
    data/demo/coco       annotations/instances_{train,val}2017.json,
                         {train,val}2017/*.png                              (COCO)
    data/demo/ade20k     images/{training,validation}/*.png,
                         annotations/{training,validation}/*.png            (ADE20K)
    data/demo/clips      train/<class>/*.mp4, val/<class>/*.mp4             (class folders)
    data/demo/digits     train/<class>/*.png, val/<class>/*.png             (class folders)
    data/demo/heads      {train,val}/<case>/*.nii.gz, slices/               (NIfTI, and PNG)
    data/demo/pairs      {train,val}/{A,B,label}/*.png                      (LEVIR-CD)
    data/demo/shapes     <class>/*.txt, modelnet40_{train,test}.txt          (ModelNet40)
    data/demo/captions   {train,val}/*.png, {train,val}.json                 (LLaVA)
    data/demo/photographs {train,val}/{HR,LR}/*.png                         (DIV2K)

coco and ade20k show the same scenes, so that their labels can be checked against each other.
Everything follows from --seed; a set that is already there with the same settings is kept.
"""
import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import captions
import clips
import numpy as np
import pairs
import photographs
import scenes
import shapes
import small_digits
import volumes
from PIL import Image

PHOTO_LABEL = len(scenes.CLASSES) + 1  # ADE20K ids start at 1; 0 means 'not labelled'
DEFAULTS = dict(
    seed=0,
    cls_size=56, cls_tile=(48, 58), cls_per_class=(400, 100),
    scene_size=128, scene_tile=(34, 64), scene_digits=(2, 5), scenes=(600, 100),
    clip_size=40, clip_tile=(20, 25), clip_way=(14, 17), clip_frames=12, clip_rate=8,
    clip_digits=(0, 1), clips_per_class=(300, 40),
    digits_per_class=(140, 30),
    head_shape=(64, 64, 32), heads=(40, 12),
    pair_size=96, pair_roof=(12, 32), pair_same=(1, 3), pair_changed=(0, 3), pairs=(1200, 100),
    shape_points=320, shapes_per_class=(200, 50),
    caption_size=64, caption_tile=(26, 32), captions=(4000, 200),
)
#: The sets that are built and checked by a module of their own.
DRAWN = dict(clips=clips, digits=small_digits, heads=volumes, shapes=shapes, pairs=pairs,
             photographs=photographs, captions=captions)
PARTS = ('imagenet', 'coco', 'ade20k', *DRAWN)
# The id of a set is a hash of these settings and of the code that draws it.
CODE = tuple(Path(path) for path in (__file__, scenes.__file__,
                                     *(module.__file__ for module in DRAWN.values())))


def settings_id(settings):
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in CODE:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def build_imagenet(root, settings):
    """One digit per image, each digit used once: the class is the folder."""
    for which, (split, count) in enumerate(zip(('train', 'val'), settings['cls_per_class'],
                                               strict=True)):
        rng = np.random.default_rng([settings['seed'], 10 + which])
        labels = scenes.load_digits()[1]
        for c, name in enumerate(scenes.CLASSES):
            ids = scenes.digit_ids(split)
            for source in ids[labels[ids] == c][:count]:
                image, _, _ = scenes.make_scene(
                    rng, split, settings['cls_size'], [source], settings['cls_tile'], margin=3)
                save(image, root / split / name / f'{name}_{source:04d}.png')


def draw_scenes(split, which, settings):
    """Scenes with several digits, drawn from the split's own digits and photographs."""
    rng = np.random.default_rng([settings['seed'], 20 + which])
    pool = scenes.digit_ids(split)
    low, high = settings['scene_digits']
    for index in range(settings['scenes'][which]):
        sources = rng.choice(pool, rng.integers(low, high + 1), replace=False)
        yield index, *scenes.make_scene(rng, split, settings['scene_size'], sources,
                                        settings['scene_tile'])


def coco_annotation(digit, image_id, ann_id):
    """Masks are run lengths: digits have holes, which COCO polygons cannot say."""
    from pycocotools import mask as coco_mask
    rle = coco_mask.encode(np.asfortranarray(digit.mask, np.uint8))
    rle['counts'] = rle['counts'].decode('ascii')
    return dict(id=ann_id, image_id=image_id, category_id=digit.label + 1, iscrowd=0,
                bbox=digit.box, area=int(digit.mask.sum()), segmentation=rle,
                source_digit=digit.source)


def label_map(digits, rim, size):
    """ADE20K ids: 1..10 the digits, 11 the photograph, 0 (not labelled) the blended rim."""
    labels = np.full((size, size), PHOTO_LABEL, np.uint8)
    labels[rim] = 0
    for digit in digits:
        labels[digit.mask] = digit.label + 1
    return labels


def build_scenes(coco_root, ade_root, settings):
    categories = [dict(id=i + 1, name=n, supercategory='digit')
                  for i, n in enumerate(scenes.CLASSES)]
    size = settings['scene_size']
    for which, (split, ade_split) in enumerate((('train', 'training'), ('val', 'validation'))):
        images, annotations = [], []
        for index, image, digits, rim in draw_scenes(split, which, settings):
            name = f'{index:06d}.png'
            save(image, coco_root / f'{split}2017' / name)
            save(image, ade_root / 'images' / ade_split / name)
            save(label_map(digits, rim, size), ade_root / 'annotations' / ade_split / name)
            images.append(dict(id=index + 1, file_name=name, width=size, height=size))
            for digit in digits:
                annotations.append(coco_annotation(digit, index + 1, len(annotations) + 1))
        path = coco_root / 'annotations' / f'instances_{split}2017.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                        categories=categories)))


def check(condition, message):
    if not condition:
        raise SystemExit(f'demo data: check failed: {message}')


def verify_imagenet(root, settings):
    size, labels = settings['cls_size'], scenes.load_digits()[1]
    seen = {}
    for split, count in zip(('train', 'val'), settings['cls_per_class'], strict=True):
        seen[split] = set()
        for c, name in enumerate(scenes.CLASSES):
            files = sorted((root / split / name).iterdir())
            check(len(files) == count, f'{root / split / name} holds {len(files)} images')
            for path in files:
                source = int(path.stem.split('_')[1])
                check(labels[source] == c, f'{path} is not a {name}')
                seen[split].add(source)
            with Image.open(files[0]) as image:
                check(image.size == (size, size) and image.mode == 'RGB', f'{files[0]}: format')
    check(not seen['train'] & seen['val'], 'a digit is both in train and val')
    return {split: len(ids) for split, ids in seen.items()}


def verify_scenes(coco_root, ade_root, settings):
    """Read everything back, and compare the COCO masks with the ADE20K label maps."""
    from pycocotools import mask as coco_mask
    size, counts, seen = settings['scene_size'], {}, {}
    for which, (split, ade_split) in enumerate((('train', 'training'), ('val', 'validation'))):
        data = json.loads((coco_root / 'annotations' / f'instances_{split}2017.json').read_text())
        check(len(data['images']) == settings['scenes'][which], f'coco {split}: image count')
        by_image = {image['id']: [] for image in data['images']}
        for ann in data['annotations']:
            by_image[ann['image_id']].append(ann)
        seen[split] = {ann['source_digit'] for ann in data['annotations']}
        for image in data['images']:
            name = image['file_name']
            labels = np.asarray(Image.open(ade_root / 'annotations' / ade_split / name))
            check(labels.shape == (size, size) and labels.max() <= PHOTO_LABEL, f'{name}: labels')
            check((coco_root / f'{split}2017' / name).read_bytes()
                  == (ade_root / 'images' / ade_split / name).read_bytes(), f'{name} differs')
            check(by_image[image['id']], f'coco {split}: {name} has no digit')
            painted = np.zeros((size, size), np.uint8)
            for ann in by_image[image['id']]:
                mask = coco_mask.decode(ann['segmentation']).astype(bool)
                x, y, w, h = ann['bbox']
                check(0 <= x and 0 <= y and x + w <= size and y + h <= size, f'{name}: box outside')
                inside = mask[y:y + h, x:x + w]
                check(inside.sum() == mask.sum() == ann['area'] > 0, f'{name}: area or box')
                check(all(inside.any(a)[[0, -1]].all() for a in (0, 1)), f'{name}: box not tight')
                check(not painted[mask].any(), f'{name}: digits overlap')
                painted[mask] = ann['category_id']
            digit = (labels > 0) & (labels < PHOTO_LABEL)
            check((painted == np.where(digit, labels, 0)).all(), f'{name}: COCO and ADE20K differ')
        counts[split] = dict(images=len(data['images']), digits=len(data['annotations']))
    check(not seen['train'] & seen['val'], 'a digit is both in train and val')
    return counts


def build(root, settings, parts=PARTS):
    """Build the parts that are missing or were made with other settings; verify what was built."""
    root, wanted = Path(root), settings_id(settings)
    scenes_parts = {'coco', 'ade20k'} if {'coco', 'ade20k'} & set(parts) else set()
    groups = [('imagenet',)] if 'imagenet' in parts else []
    groups += [('coco', 'ade20k')] if scenes_parts else []
    groups += [(part,) for part in DRAWN if part in parts]
    for group in groups:
        stamps = [root / part / 'made.json' for part in group]
        if all(s.is_file() and json.loads(s.read_text())['id'] == wanted for s in stamps):
            print(f'{" and ".join(group)}: already in {root}')
            continue
        start = time.time()
        for part in group:
            shutil.rmtree(root / part, ignore_errors=True)
        if group == ('imagenet',):
            build_imagenet(root / 'imagenet', settings)
            counts = verify_imagenet(root / 'imagenet', settings)
        elif group[0] in DRAWN:
            DRAWN[group[0]].build(root / group[0], settings)
            counts = DRAWN[group[0]].verify(root / group[0], settings, check)
        else:
            build_scenes(root / 'coco', root / 'ade20k', settings)
            counts = verify_scenes(root / 'coco', root / 'ade20k', settings)
        for path in stamps:  # written last: a half-made set has no stamp and is made again
            path.write_text(json.dumps(dict(id=wanted, settings=settings, counts=counts)))
        print(f'{" and ".join(group)}: built and checked in {time.time() - start:.0f} s: {counts}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=PARTS, metavar='|'.join(PARTS),
                        help='default: all')
    parser.add_argument('--root', type=Path, default=Path('data/demo'))
    parser.add_argument('--seed', type=int, default=DEFAULTS['seed'])
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f'unknown set: {", ".join(sorted(unknown))}')
    build(args.root, {**DEFAULTS, 'seed': args.seed}, args.parts)


if __name__ == '__main__':
    main()
