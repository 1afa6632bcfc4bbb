"""The files that samples are made from: images, videos, and clouds of points."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def _clip_to_sheet(clips):
    """The frames of the first view (V, T, H, W, C) in rows, as one image with white lines."""
    frames, line = clips[0], 2
    count, height, width, channels = frames.shape
    rows = -(-count // max(4, round(count ** 0.5)))
    columns = -(-count // rows)  # rows of one length, as far as it goes
    sheet = np.full((rows * (height + line) - line, columns * (width + line) - line, channels), 255,
                    frames.dtype)
    for i, frame in enumerate(frames):
        y, x = i // columns * (height + line), i % columns * (width + line)
        sheet[y:y + height, x:x + width] = frame
    return sheet


def _cloud_to_picture(points):
    from vmamba_mm.mm.points.draw import picture_of

    return picture_of(points)


@dataclass(frozen=True)
class Source:
    """A kind of files.

    Attributes:
        name: what one is called in messages; ``name + 's'`` for several.
        path_key: of a sample's file in its info.
        data_key: of what a pipeline loads of it, from then on.
        suffixes: of the files that are taken from a folder.
        loader: a step that loads it, for messages.
        picture: gives an image (H, W) or (H, W, C) to draw, of what was loaded.
    """

    name: str
    path_key: str
    data_key: str
    suffixes: tuple[str, ...]
    loader: str
    picture: Callable[[np.ndarray], np.ndarray]

    def size(self, loaded: np.ndarray) -> str:
        """The size of what was loaded in words, '640x480 pixels'."""
        if self is CLOUD:
            return f'{len(loaded)} points'
        height, width = loaded.shape[:2] if self is IMAGE else loaded.shape[2:4]
        return f'{width}x{height} pixels'


IMAGE = Source(
    name='image', path_key='img_path', data_key='img',
    suffixes=('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm'),
    loader='LoadImageFromFile', picture=lambda image: image)
VIDEO = Source(
    name='video', path_key='video_path', data_key='clips',
    suffixes=('.3gp', '.avi', '.flv', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.ogv',
              '.ts', '.webm', '.wmv'),
    loader='vmamba_mm.LoadClips', picture=_clip_to_sheet)

CLOUD = Source(
    name='cloud', path_key='path', data_key='points', suffixes=('.csv', '.npy', '.txt', '.xyz'),
    loader='vmamba_mm.LoadPoints', picture=_cloud_to_picture)


#: In the info of a pair of images, the later one.
SECOND_KEY = 'img_path2'


def source_of(info: dict) -> Source:
    """The kind of the file that a sample's info names."""
    return next((source for source in (VIDEO, CLOUD) if source.path_key in info), IMAGE)
