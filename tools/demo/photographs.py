"""Photographs of pip packages, large and half as large, for super-resolution by 2.

    <root>/{train,val}/HR/<name>.png, LR/<name>x2.png

The large ones have half the size of the photographs, so that the artefacts of their JPEG files are
gone. The small ones are made by the bicubic of the field's data sets. Photographs are held out as
a whole.
"""
from pathlib import Path

import numpy as np
import scenes
from PIL import Image

from vmamba_mm.mm.restoration.images import resize

FOLDERS = ('HR', 'LR')
SCALE = 2


def halved(image):
    """(H, W, 3) uint8 with sides of half, rounded down to multiples of ``SCALE``."""
    height, width = (side // (2 * SCALE) * 2 * SCALE for side in image.shape[:2])
    small = resize(image[:height, :width] / 255, (height // 2, width // 2))
    return (small.clip(0, 1) * 255).round().astype(np.uint8)


def build(root, settings):
    for split in ('train', 'val'):
        for folder in FOLDERS:
            (root / split / folder).mkdir(parents=True)
        for (_, file), photo in zip(scenes.PHOTOS[split], scenes.load_photos(split), strict=True):
            name, large = Path(file).stem, halved(photo)
            size = [side // SCALE for side in large.shape[:2]]
            small = (resize(large / 255, size).clip(0, 1) * 255).round().astype(np.uint8)
            Image.fromarray(large).save(root / split / 'HR' / f'{name}.png')
            Image.fromarray(small).save(root / split / 'LR' / f'{name}x{SCALE}.png')


def list_names(root, split):
    return sorted(path.stem for path in (root / split / 'HR').iterdir())


def read_pair(root, split, name):
    """The large and the small photograph, (H, W, 3) uint8."""
    return tuple(np.asarray(Image.open(root / split / folder / f'{name}{end}.png'))
                 for folder, end in zip(FOLDERS, ('', f'x{SCALE}'), strict=True))


def verify(root, settings, check):
    """Read everything back; no photograph is in both splits."""
    names = {split: list_names(root, split) for split in ('train', 'val')}
    for split, listed in names.items():
        check(len(listed) == len(scenes.PHOTOS[split]), f'{root / split} holds {len(listed)}')
        for name in listed:
            large, small = read_pair(root, split, name)
            check(large.shape == (SCALE * small.shape[0], SCALE * small.shape[1], 3),
                  f'{split}/{name}: sizes')
    check(not set(names['train']) & set(names['val']), 'a photograph is in both splits')
    return {split: len(listed) for split, listed in names.items()}
