"""Restored images as files, for tools/predict.py."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.images import KEY, signature
from vmamba_mm.mm.restoration.images import Image, encode_png, read_image, resize


def restore_file(model: nn.Module, path: Path, out: Path, name: str = '') -> str:
    """Restore an image file and write the result as PNG, with the bits of the file.

    Alpha is kept, and resized where the image is. A grey image goes through a model of colours as
    three equal channels, and comes back grey.

    Args:
        model: :class:`vmamba_mm.mm.restoration.models.ImageRestorer`.
        path, out: of the image and of the result.
        name: before the progress of an image in several tiles, which is shown in a terminal.

    Returns:
        A description of the result.

    Raises:
        UserError: if the file cannot be read, or is a colour image and the model is for grey ones.
    """
    image, channels = read_image(path), model.backbone.in_channels
    values = image.values
    is_grey = values.shape[2] == 1
    if not is_grey and channels == 1:
        raise UserError(f'{path} is a colour image, and the model restores grey ones')
    if is_grey and channels == 3:
        values = values.repeat(3, 2)
    if values.shape[2] != channels:
        raise UserError(f'{path} has {values.shape[2]} channel(s), and the model takes {channels}')
    device = next(model.parameters()).device
    inputs = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None].to(device)
    restored = model.restore(inputs, _Progress(name))[0].cpu().numpy().transpose(1, 2, 0)
    if is_grey and channels == 3:
        restored = restored.mean(2, keepdims=True)
    alpha = image.alpha
    if alpha is not None and alpha.shape[:2] != restored.shape[:2]:
        alpha = resize(alpha, restored.shape[:2])
    content = encode_png(Image(restored, alpha, image.dtype), (KEY, signature(path)))
    out.write_bytes(content)
    height, width = restored.shape[:2]
    return f'{values.shape[1]}x{values.shape[0]} to {width}x{height}, ' \
        f'{8 * image.dtype.itemsize} bits' + (', grey' if is_grey else '') \
        + (', with alpha' if alpha is not None else '')


class Restorer:
    """Restored images of a model, by :func:`restore_file`.

    Args:
        model: :class:`vmamba_mm.mm.restoration.models.ImageRestorer`.
        cfg, meta: are not needed.
    """

    done = 'restored'
    suffixes = ('.png',)

    def __init__(self, model: nn.Module, cfg: Any, meta: Mapping[str, Any]):
        self.model = model

    def __call__(self, path: Path, out: Path, place: str) -> str:
        return restore_file(self.model, path, out, place)


class _Progress:
    """The share of the tiles that are done, in one line of a terminal."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, done: int, total: int) -> None:
        if total > 1 and sys.stderr.isatty():
            end = '\n' if done == total else ''
            print(f'\r{self.name} tile {done} of {total}', end=end, file=sys.stderr, flush=True)
