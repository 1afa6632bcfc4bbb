"""Images of 8 or 16 bits, grey or colour, with or without alpha: read, resized and written."""

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import missing_package

#: What values of a file's dtype mean 1.
_ONE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
#: Of files of these suffixes the orientation is applied; they have neither alpha nor 16 bits.
_JPEG = ('.jpg', '.jpeg')
#: How a PNG file begins, and the place and value of the byte that says it is grey with alpha.
_PNG, _COLOUR_TYPE, _GREY_ALPHA = b'\x89PNG\r\n\x1a\n', 25, 4


class Image(NamedTuple):
    """An image in memory, values in [0, 1]."""

    values: np.ndarray  #: (H, W, C) fp32, one channel or RGB
    alpha: np.ndarray | None  #: (H, W, 1) fp32
    dtype: np.dtype  #: of the file: uint8 or uint16


def opencv():
    """The module cv2, or one line that says how to get it."""
    try:
        import cv2
    except ImportError as err:
        raise missing_package('cv2') from err
    return cv2


def read_image(path: str | Path) -> Image:
    """Read an image file.

    Raises:
        UserError: if it is missing, empty, broken, or of another kind.
    """
    cv2, path = opencv(), Path(path)
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as err:
        raise UserError(f'the image {path} cannot be read ({err.strerror})') from err
    if not content.size:
        raise UserError(f'the image {path} is empty')
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR if path.suffix.lower() in _JPEG else \
        cv2.IMREAD_UNCHANGED
    try:
        image = cv2.imdecode(content, flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f'{path} is corrupt, or no image')
    image = image if image.ndim == 3 else image[..., None]
    if image.dtype not in _ONE or image.shape[2] not in (1, 2, 3, 4):
        raise UserError(f'{path} has {image.shape[2]} channel(s) of {image.dtype}; images of '
                        'restoration have 8 or 16 bits, and are grey or colour')
    values = image.astype(np.float32) / _ONE[image.dtype]
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1:]
    if content[:8].tobytes() == _PNG and content[_COLOUR_TYPE] == _GREY_ALPHA:
        values = values[..., :1]  # OpenCV repeats it
    if values.shape[2] == 3:
        values = values[..., ::-1]
    return Image(np.ascontiguousarray(values), alpha, image.dtype)


def encode_png(image: Image, text: tuple[str, str] | None = None) -> bytes:
    """A PNG of the image's bits, its alpha kept.

    Args:
        image: whose values are clipped and rounded.
        text: a keyword and a text that are written into the file.
    """
    cv2 = opencv()
    values = image.values[..., ::-1]
    if image.alpha is not None:
        if values.shape[2] == 1:  # OpenCV writes no grey with alpha
            values = values.repeat(3, 2)
        values = np.concatenate([values, image.alpha], 2)
    one = _ONE[np.dtype(image.dtype)]
    stored = (values.astype(np.float64).clip(0, 1) * one).round().astype(image.dtype)
    done, content = cv2.imencode('.png', np.ascontiguousarray(stored))
    if not done:
        raise UserError(f'an image of {values.shape[1]}x{values.shape[0]} cannot be written as PNG')
    content = content.tobytes()
    if text is None:
        return content
    # The chunk iTXt after the header, whose length is fixed.
    data = text[0].encode('latin-1') + b'\0\0\0\0\0' + text[1].encode()
    chunk = b'iTXt' + data
    return b''.join([content[:33], len(data).to_bytes(4, 'big'), chunk,
                     zlib.crc32(chunk).to_bytes(4, 'big'), content[33:]])


# --- bicubic, as MATLAB's imresize ----------------------------------------------------------------

def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x <= 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1,
                    np.where(x < 2, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2, 0.0))


@lru_cache(64)
def _weights(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of ``out`` places, which pixels it reads and their weights, (out, taps) each."""
    scale = out / length
    stretch = min(1.0, scale)  # wider when it makes an image smaller
    taps = math.ceil(4 / stretch) + 2
    centres = (np.arange(out) + 0.5) / scale - 0.5
    places = np.floor(centres - taps / 2).astype(np.int64)[:, None] + 1 + np.arange(taps)
    weights = stretch * _cubic(stretch * (centres[:, None] - places))
    weights /= weights.sum(1, keepdims=True)
    # Mirrored at the border, whose pixel comes twice.
    places = places % (2 * length)
    return np.where(places < length, places, 2 * length - 1 - places), weights


def resize(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Bicubic with antialiasing as MATLAB's ``imresize`` has it, which made the field's images.

    Args:
        values: (H, W, C).
        size: height and width of the result.

    Returns:
        (height, width, C) fp32, not clipped.
    """
    for axis, out in enumerate(size):
        places, weights = _weights(values.shape[axis], int(out))
        taken = np.take(values.astype(np.float64), places, axis)  # (..., out, taps, ...)
        shape = [1] * taken.ndim
        shape[axis:axis + 2] = weights.shape
        values = (taken * weights.reshape(shape)).sum(axis + 1)
    return values.astype(np.float32)
