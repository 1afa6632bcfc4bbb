"""The images that a tool is given, and where it writes the picture that it makes of each."""

import hashlib
import itertools
import os
import sys
import traceback
from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.command import shorten, wants_traceback
from vmamba_mm.mm.cli.explain import explain
from vmamba_mm.mm.sources import IMAGE

KEY = 'Made from'  # in the PNG: the image's name, and a hash of its path


def add_channels_option(parser):
    parser.add_argument('--channels', type=int, nargs='+', metavar='C',
                        help='draw these channels of the images as they are loaded, counted from '
                        '0: one for grey, three for red, green and blue (default: colours as they '
                        'are; of 2 channels the first, of more than 4 the first three)')


def check_channels_option(args):
    if args.channels and (len(args.channels) not in (1, 3) or min(args.channels) < 0):
        raise UserError('--channels takes one or three numbers, counted from 0, not '
                        f'{" ".join(map(str, args.channels))}')


def list_images(names, source=IMAGE):
    """The image files named, or in the folders named, in order; with a ``source`` its files.

    What is hidden in a folder (``._a.jpg``, all in ``.thumbnails``) is left out, which is said.
    """
    paths = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob('*') if not p.is_dir())
            hidden = [p for p in files
                      if any(part.startswith('.') for part in p.relative_to(path).parts)]
            if hidden:
                print(f'skipped {len(hidden)} hidden file(s): {shorten(hidden)}',
                      file=sys.stderr)
            hidden = set(hidden)
            images = [p for p in files if p.suffix.lower() in source.suffixes and p not in hidden]
            if not images:
                raise UserError(f'the folder {path} has no {source.name}s')
            paths += images
        elif not path.is_file():
            raise UserError(f'the {source.name} {path} does not exist')
        else:
            paths.append(path)
    return paths


class Outputs:
    """Names for the pictures of images, in one folder.

    With several ``suffixes`` there is another file of the same name beside each picture.

    A picture is called as its image, or with a number where that name is taken: by another
    picture of this run, by a file that is no picture of the same image from an earlier one, or,
    on a file system that knows no capitals, by one that differs in them alone. So the same
    command again gives the same names.
    """

    def __init__(self, folder, suffixes=('.png',)):
        self.folder, self.taken, self.suffixes = Path(folder), set(), suffixes
        os.makedirs(self.folder, exist_ok=True)
        self.present = {p.name.casefold(): p for p in self.folder.iterdir()}

    def choose(self, image):
        """The picture's path."""
        number, stem = 0, image.stem
        while not self._is_free(stem, image):
            number += 1
            stem = f'{image.stem}_{number}'
        self.taken.add(stem.casefold())
        return self.folder / f'{stem}.png'

    def _is_free(self, stem, image):
        there = [self.present.get(f'{stem}{suffix}'.casefold()) for suffix in self.suffixes]
        return stem.casefold() not in self.taken and all(
            path is None or made_from(path) == signature(image) for path in there)


def signature(image):
    path = os.path.realpath(image)
    return f'{image.name} {hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}'


def sign(picture, image):
    """Write into a PNG which image it was made from."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, signature(image))
    with Image.open(picture) as opened:
        opened.load()
    opened.save(picture, pnginfo=info)


def made_from(picture):
    """The text that :func:`sign` wrote into a picture, or that a comment of a PLY file has, or None
    for any other file."""
    from PIL import Image

    if picture.suffix == '.ply':
        with open(picture, encoding='utf-8', errors='replace') as file:
            comments = [line for line in itertools.islice(file, 4) if line.startswith('comment ')]
        return next((line.rstrip('\n').removeprefix(f'comment {KEY}: ') for line in comments), None)
    try:
        with Image.open(picture) as opened:
            return opened.info.get(KEY)
    except OSError:
        return None


class Failures:
    """Images that could not be done, each told at once on stderr; the others go on."""

    def __init__(self, total, what, source=IMAGE):
        self.total, self.what, self.source, self.failed = total, what, source, []

    def add(self, image, err):
        message = explain(err) or f'{type(err).__name__}: {err}'
        message = ' '.join(message.split())
        if str(image) not in message:
            message = f'{image}: {message}'
        if wants_traceback():
            traceback.print_exception(err)
        print(f'skipped: {message}', file=sys.stderr, flush=True)
        self.failed.append((image, message))

    def finish(self):
        """Raise one line if there were any."""
        if self.failed:
            description = (self.failed[0][1] if len(self.failed) == 1
                           else shorten([image for image, _ in self.failed]))
            raise UserError(f'{len(self.failed)} of {self.total} {self.source.name}s could not '
                            f'be {self.what}: {description}')
