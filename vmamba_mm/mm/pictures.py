"""Pictures to draw on, of whatever a pipeline's loader reads: any number of channels, any dtype."""

import numpy as np

from vmamba_mm.errors import UserError


def default_channels(count, bgr=True):
    """The channels of an image that are drawn: one for grey, or three for red, green and blue."""
    if count < 3:
        return (0,)
    return (2, 1, 0) if bgr and count < 5 else (0, 1, 2)


def check_channels(channels, count):
    """Raise one line unless an image of ``count`` channels has these."""
    if max(channels) >= count:
        raise UserError(f'--channels {" ".join(map(str, channels))}: the images have {count} '
                        f'channel(s), counted from 0 to {count - 1}')


def to_picture(image, channels):
    """The chosen channels for the screen, (H, W, 3) uint8 in RGB.

    8-bit values stay as they are, floats that hold them too. All else is spread from the 1st to
    the 99th percentile of each channel, since its range is not known.

    Args:
        image: (H, W) or (H, W, C), of any dtype.
        channels: one, or three for red, green and blue.
    """
    image = image[..., None] if image.ndim == 2 else image
    image = image[..., list(channels)]
    if image.dtype == bool:
        image = image * np.uint8(255)
    if image.dtype != np.uint8:
        image = _to_bytes(image.astype(np.float64))
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _to_bytes(image):
    finite = np.isfinite(image)
    image = np.where(finite, image, 0)
    if image.min(initial=0) >= 0 and 1 < image.max(initial=0) <= 255 \
            and (image == image.round()).all():
        return image.astype(np.uint8)
    low, high = np.stack([np.percentile(values[seen], (1, 99)) if seen.any() else (0, 1)
                          for values, seen in zip(np.moveaxis(image, -1, 0),
                                                  np.moveaxis(finite, -1, 0), strict=True)], -1)
    spread = np.where(high > low, high - low, 1)
    return (255 * ((image - low) / spread).clip(0, 1)).round().astype(np.uint8)


def reads_bgr(steps, preprocessor=None):
    """Whether the loader of a pipeline gives blue first, as mmcv's does but for tifffile.

    Of another loader the model's preprocessor tells, which then swaps red and blue.
    """
    from mmcv.transforms import LoadImageFromFile

    for step in steps:
        if getattr(type(step), 'transform', None) is LoadImageFromFile.transform:
            return step.imdecode_backend != 'tifffile'
    return bool(getattr(preprocessor, 'to_rgb', False)
                or getattr(preprocessor, '_channel_conversion', False))


class Pictures:
    """Turns images into pictures, and says once which channels those show.

    Args:
        channels: one or three, or None for a choice by the number that there is.
        bgr: whether 3 or 4 channels begin with blue.
    """

    def __init__(self, channels=None, bgr=True, say=print):
        self.channels, self.bgr, self.say, self.said = channels, bgr, say, set()

    def __call__(self, image):
        count = image.shape[2] if image.ndim == 3 else 1
        channels = self.channels or default_channels(count, self.bgr)
        check_channels(channels, count)
        if count not in (1, 3) and count not in self.said:
            self.said.add(count)
            self.say(f'drawing channel{"s" if len(channels) > 1 else ""} '
                     f'{", ".join(map(str, channels))} of {count} (--channels chooses)')
        return to_picture(image, channels)
