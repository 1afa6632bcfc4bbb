"""Made-up heads in MRI: volumes with ventricles and a tumour, as NIfTI files, and their slices.

Brightness tells neither. Ventricles are as dark as skull, air and the furrows of the brain; the
tumour is as bright as scalp and vessels. Place, size and shape tell them.

    <root>/{train,val}/<case>/<case>.nii.gz, <case>_mask.nii.gz      a folder for each head
    <root>/slices/{images,masks}/{train,val}/<case>_<slice>.png      axial slices, 8 bits

The volumes are (X, Y, Z), the axial slices along Z, as NIfTI has them.
"""
import numpy as np
from PIL import Image
from scipy import ndimage

CLASSES = ('background', 'ventricles', 'tumour')
AIR, DARK, BRAIN, BRIGHT = 0.1, 0.15, 0.45, 0.8


def smooth_noise(rng, shape, sigma):
    """Noise of deviation 1 that changes over ``sigma`` voxels."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma, mode='wrap')
    return noise / noise.std()


def ellipsoid(grid, centre, radii):
    """1 on its surface, less inside."""
    return np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True)))


def draw_vessel(rng, shape, inside):
    """A tube of one or two voxels that wanders through the brain."""
    vessel = np.zeros(shape, bool)
    place = np.array([rng.choice(axis) for axis in np.nonzero(inside)], float)
    way = rng.normal(size=3)
    for _ in range(60):
        way = way / np.linalg.norm(way) + 0.35 * rng.normal(size=3)
        place = place + way / np.linalg.norm(way)
        if not all(0 <= p < side for p, side in zip(place, shape, strict=True)):
            break
        vessel[tuple(place.astype(int))] = True
    return ndimage.binary_dilation(vessel) & inside


def draw_head(rng, shape):
    """The volume (X, Y, Z) in fp32, and its mask of CLASSES in uint8."""
    grid = np.meshgrid(*(np.arange(side) - (side - 1) / 2 for side in shape), indexing='ij')
    half = np.array(shape) / 2
    centre = rng.uniform(-2, 2, 3)
    head = ellipsoid(grid, centre, half * rng.uniform(0.82, 0.95, 3))
    head = head + 0.02 * smooth_noise(rng, shape, 6)
    brain = head < 0.78
    volume = np.select([brain, head < 0.88, head < 1], [BRAIN, DARK, BRIGHT], AIR)
    volume[brain] += 0.05 * smooth_noise(rng, shape, 3)[brain]
    mask = np.zeros(shape, np.uint8)

    furrows = (smooth_noise(rng, shape, 2) > 1.1) & brain & (head > 0.55)
    volume[furrows] = DARK
    radii = half * rng.uniform((0.08, 0.22, 0.18), (0.13, 0.35, 0.3))
    shift = half[0] * rng.uniform(0.13, 0.2)
    ventricles = np.minimum(*(ellipsoid(grid, centre + (side * shift, 0, 0), radii)
                              for side in (-1, 1))) < 1
    volume[ventricles], mask[ventricles] = DARK, 1

    for _ in range(rng.integers(5, 9)):
        vessel = draw_vessel(rng, shape, brain & ~ventricles)
        volume[vessel] = BRIGHT
    radius = rng.uniform(3.5, 7)
    places = np.argwhere((head < 0.6) & ~ndimage.binary_dilation(ventricles, iterations=2))
    spot = places[rng.integers(len(places))] - (np.array(shape) - 1) / 2
    tumour = ellipsoid(grid, spot, radius * rng.uniform(0.8, 1.2, 3))
    tumour = (tumour + 0.15 * smooth_noise(rng, shape, 2) < 1) & brain & ~ventricles
    volume[tumour], mask[tumour] = BRIGHT, 2

    volume = volume * (1 + 0.1 * smooth_noise(rng, shape, 12)) + rng.normal(0, 0.05, shape)
    return volume.astype(np.float32), mask


def slice_image(volume, z):
    """An axial slice as an image of 8 bits, (Y, X)."""
    return np.clip(np.rint(volume[:, :, z].T * 200), 0, 255).astype(np.uint8)


def build(root, settings):
    import nibabel

    shape = settings['head_shape']
    for which, (split, count) in enumerate(zip(('train', 'val'), settings['heads'], strict=True)):
        rng = np.random.default_rng([settings['seed'], 40 + which])
        folders = {name: root / 'slices' / name / split for name in ('images', 'masks')}
        for folder in folders.values():
            folder.mkdir(parents=True)
        for number in range(count):
            case = f'head{number:03d}'
            volume, mask = draw_head(rng, shape)
            (root / split / case).mkdir(parents=True)
            for name, values in ((case, volume), (f'{case}_mask', mask)):
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)),
                             root / split / case / f'{name}.nii.gz')
            for z in range(shape[2]):
                name = f'{case}_{z:02d}.png'
                Image.fromarray(slice_image(volume, z)).save(folders['images'] / name)
                Image.fromarray(mask[:, :, z].T.copy()).save(folders['masks'] / name)


def read_head(folder):
    """The volume and the mask of a case."""
    import nibabel

    return tuple(np.asarray(nibabel.load(folder / f'{folder.name}{end}.nii.gz').dataobj)
                 for end in ('', '_mask'))


def verify(root, settings, check):
    """Read everything back, and compare the slices with the volumes."""
    shape, counts = tuple(settings['head_shape']), {}
    for split, count in zip(('train', 'val'), settings['heads'], strict=True):
        cases = sorted(p for p in (root / split).iterdir())
        check(len(cases) == count, f'{split} holds {len(cases)} heads')
        for case in cases:
            volume, mask = read_head(case)
            check(volume.shape == mask.shape == shape, f'{case}: {volume.shape}')
            check(set(np.unique(mask)) == {0, 1, 2}, f'{case} lacks a class')
        z = shape[2] // 2
        image, label = (np.asarray(Image.open(
            root / 'slices' / name / split / f'{case.name}_{z:02d}.png'))
            for name in ('images', 'masks'))
        check((label == mask[:, :, z].T).all() and (image == slice_image(volume, z)).all(),
              f'{case}: slice {z} differs')
        counts[split] = count
    return counts
