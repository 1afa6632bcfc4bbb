"""The images of small_data.py: read once, kept on the device."""

from dataclasses import dataclass

from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.images import list_images


@dataclass
class Split:
    """Images as (N, 3, S, S) uint8, RGB, and their classes as (N,) int64, on the device."""

    images: 'torch.Tensor'  # noqa: F821
    labels: 'torch.Tensor'  # noqa: F821

    def __len__(self):
        return len(self.labels)


def find_classes(folder):
    """Class -> image files of a folder of class folders.

    Raises:
        UserError: if there is no such folder, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f'the folder {folder} does not exist: --data takes a folder with train/ '
                        'and val/, both with a folder for each class')
    paths_of = {p.name: list_images([p]) for p in sorted(folder.iterdir())
                if p.is_dir() and not p.name.startswith('.')}
    if len(paths_of) < 2:
        raise UserError(f'{folder} has {len(paths_of)} class folder(s); at least 2 are needed')
    return paths_of


def read_image(path, side):
    """(3, side, side) uint8 RGB: the shorter side resized by bicubic, its centre cropped."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert('RGB'), (side, side), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError) as err:
        raise UserError(f'{path} is corrupt, or no image') from err
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load(root, size, device):
    """The splits by name, and the classes. Images are kept 8/7 times as large as the models see
    them, which is ImageNet's 256 to 224."""
    import torch
    from mmengine.utils import track_iter_progress

    classes_of = {split: find_classes(root / split) for split in ('train', 'val')}
    if list(classes_of['train']) != list(classes_of['val']):
        differing = sorted(set(classes_of['train']) ^ set(classes_of['val']))
        raise UserError(f'train/ and val/ of {root} must have the same classes; only one of them '
                        f'has {", ".join(differing)}')
    splits = {}
    for split, classes in classes_of.items():
        files = [(path, c) for c, paths in enumerate(classes.values()) for path in paths]
        print(f'reading {split}')
        images = [read_image(path, round(size * 8 / 7)) for path, _ in track_iter_progress(files)]
        print(flush=True)  # ends the line of the progress bar
        splits[split] = Split(torch.stack(images).to(device),
                              torch.tensor([c for _, c in files]).to(device))
    return splits, list(classes_of['train'])
