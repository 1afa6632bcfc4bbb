"""Small grey images of handwritten digits, a folder for each class.

    <root>/{train,val}/<class>/<class>_<number>.png

They are scikit-learn's (UCI's optical recognition of handwritten digits), 8x8 pixels of 17 shades.
A number is that of the digit in ``sklearn.datasets.load_digits``.
"""
from functools import lru_cache

import numpy as np
import scenes
from PIL import Image

SIDE = 8


@lru_cache(maxsize=1)
def load_digits():
    """(1797, 8, 8) uint8 images from 0 to 255 and (1797,) labels."""
    from sklearn.datasets import load_digits as of_sklearn

    found = of_sklearn()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target


def digit_ids(label, split, counts):
    """Indices of digits of a class: of 'train' the first so many, of 'val' the last."""
    ids = np.flatnonzero(load_digits()[1] == label)
    return ids[:counts[0]] if split == 'train' else ids[-counts[1]:]


def build(root, settings):
    images, _ = load_digits()
    for split in ('train', 'val'):
        for label, name in enumerate(scenes.CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for source in digit_ids(label, split, settings['digits_per_class']):
                Image.fromarray(images[source]).save(folder / f'{name}_{source:04d}.png')


def read(root, split):
    """The images (N, H, W) in uint8 and their classes (N), by the order of the folders' names."""
    images, labels = [], []
    for label, name in enumerate(sorted(scenes.CLASSES)):
        for path in sorted((root / split / name).glob('*.png')):
            images.append(np.asarray(Image.open(path)))
            labels.append(label)
    return np.stack(images), np.array(labels)


def verify(root, settings, check):
    """Read everything back: sizes, classes, and no digit in both parts."""
    sources, counts, seen = load_digits()[1], {}, {}
    for split, count in zip(('train', 'val'), settings['digits_per_class'], strict=True):
        images, labels = read(root, split)
        check(images.shape == (10 * count, SIDE, SIDE) and images.dtype == np.uint8,
              f'{split}: images')
        check((np.bincount(labels) == count).all(), f'{split}: classes')
        seen[split] = set()
        for path in (root / split).glob('*/*.png'):
            name, number = path.stem.split('_')
            check(scenes.CLASSES[sources[int(number)]] == name == path.parent.name,
                  f'{path} is of another class')
            seen[split].add(int(number))
        counts[split] = len(labels)
    check(not seen['train'] & seen['val'], 'a digit is both in train and val')
    return counts
