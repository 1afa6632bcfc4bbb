"""Pairs of photographs of one ground at two dates, with roofs that came or went: LEVIR-CD's layout.

    <root>/{train,val}/{A,B,label}/<number>.png       before, after, and what changed (255)

The roofs are pieces of other photographs, and most pairs have some that stay, so that a single date
tells little. The later date has other light, clouds, noise, and a shift of up to a pixel and a
half: nearly all pixels differ, and the difference alone tells little.
"""
import numpy as np
import scenes
from PIL import Image
from scipy import ndimage
from volumes import smooth_noise

FOLDERS = ('A', 'B', 'label')
#: Left out at each side: where the shift has nothing to bring in.
BORDER = 4
#: The least mean difference of a roof from what it covers, of 255.
CONTRAST = 35


def draw_roof(rng, size, side_range):
    """The opacity of a rotated rectangle anywhere in the image: (size, size) in [0, 1]."""
    half = rng.uniform(*side_range, 2) / 2
    reach = float(np.hypot(*half))
    centre, angle = rng.uniform(reach, size - reach, 2), rng.uniform(0, np.pi)
    y, x = (np.arange(size) - c for c in centre)
    across = np.abs(np.stack([y[:, None] * np.cos(angle) - x * np.sin(angle),
                              y[:, None] * np.sin(angle) + x * np.cos(angle)]))
    return np.clip(0.5 - (across - half[:, None, None]).max(0), 0, 1)


def place_roofs(rng, split, ground, count, side_range):
    """Opacities and pieces of ``count`` roofs that do not touch, or of those that found a place."""
    size, roofs = len(ground), []
    taken = np.zeros((size, size), bool)
    for _ in range(count):
        piece = scenes.photo_crop(rng, split, size)
        for _ in range(20):
            alpha = draw_roof(rng, size, side_range)
            inside = alpha >= 0.5
            if not (taken & inside).any() and np.abs(piece - ground)[inside].mean() >= CONTRAST:
                taken |= ndimage.binary_dilation(inside, iterations=3)
                roofs.append((alpha, piece))
                break
    return roofs


def paste(ground, roofs):
    for alpha, piece in roofs:
        ground = ground + alpha[..., None] * (piece - ground)
    return ground


def relight(rng, image):
    """Another light of each colour, and clouds that change over a quarter of the image."""
    size = len(image)
    light = rng.uniform(0.65, 1.1) * rng.uniform(0.9, 1.1, 3)
    clouds = 1 + 0.2 * smooth_noise(rng, (size, size), size / 4)
    return image * light * clouds[..., None] + rng.uniform(-15, 15)


def as_pixels(rng, image):
    """With the noise of a sensor, without the border."""
    image = image[BORDER:-BORDER, BORDER:-BORDER]
    return np.clip(np.rint(image + rng.normal(0, 5, image.shape)), 0, 255).astype(np.uint8)


def draw_pair(rng, split, size, side_range, same, changed):
    """Both dates (size, size, 3) and the mask of what changed (size, size), 0 or 255, in uint8.

    Args:
        same, changed: how many roofs there are at both dates and at one of them; fewer where there
            is no place.
    """
    ground = scenes.photo_crop(rng, split, size + 2 * BORDER)
    roofs = place_roofs(rng, split, ground, same + changed, side_range)
    first, second = paste(ground, roofs[changed:]), paste(ground, roofs[changed:])
    mask = np.zeros(ground.shape[:2], bool)
    for roof in roofs[:changed]:
        mask |= roof[0] >= 0.5
        if rng.random() < 0.5:
            first = paste(first, [roof])
        else:
            second = paste(second, [roof])
    second = ndimage.shift(second, (*rng.uniform(-1.5, 1.5, 2), 0), order=1, mode='nearest')
    mask = mask[BORDER:-BORDER, BORDER:-BORDER]
    return as_pixels(rng, first), as_pixels(rng, relight(rng, second)), np.uint8(255 * mask)


def build(root, settings):
    size, side_range = settings['pair_size'], settings['pair_roof']
    (same_low, same_high), (low, high) = settings['pair_same'], settings['pair_changed']
    for which, (split, count) in enumerate(zip(('train', 'val'), settings['pairs'], strict=True)):
        rng = np.random.default_rng([settings['seed'], 50 + which])
        for folder in FOLDERS:
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            images = draw_pair(rng, split, size, side_range, rng.integers(same_low, same_high + 1),
                               rng.integers(low, high + 1))
            for folder, image in zip(FOLDERS, images, strict=True):
                Image.fromarray(image).save(root / split / folder / f'{number:04d}.png',
                                            compress_level=1)


def list_pairs(root, split):
    """The names of the files of a split."""
    return sorted(path.name for path in (root / split / FOLDERS[0]).iterdir())


def read_pair(root, split, name):
    """Both dates (H, W, 3) in uint8, and the mask of what changed (H, W) in bool."""
    first, second, label = (np.asarray(Image.open(root / split / folder / name))
                            for folder in FOLDERS)
    return first, second, label > 0


def verify(root, settings, check):
    """Read everything back; what is labelled differs more than what is not."""
    size, counts = settings['pair_size'], {}
    for split, count in zip(('train', 'val'), settings['pairs'], strict=True):
        names = list_pairs(root, split)
        check(len(names) == count, f'{root / split} holds {len(names)} pairs')
        sums = np.zeros((2, 2))
        for name in names:
            first, second, mask = read_pair(root, split, name)
            check(first.shape == second.shape == (size, size, 3) and mask.shape == (size, size),
                  f'{split}/{name}: sizes')
            apart = np.abs(first.astype(float) - second).mean(-1)
            sums += [(apart[where].sum(), where.sum()) for where in (mask, ~mask)]
        check(0.01 < sums[0, 1] / sums[:, 1].sum() < 0.3, f'{split}: share of what changed')
        check(sums[0, 0] / sums[0, 1] > 1.5 * sums[1, 0] / sums[1, 1], f'{split}: labels')
        counts[split] = count
    return counts
