"""Steps of a pipeline of images that are talked about."""

from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from vmamba_mm.errors import UserError
from vmamba_mm.registry import TRANSFORMS

WAYS = ('resize', 'crop', 'letterbox')


@TRANSFORMS.register_module()
class LoadPicture:
    """Read the image ``img_path`` of a sample, in RGB as ``img``; a sample without one has none.

    Raises:
        UserError: if a file cannot be read.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image, ImageOps

        path = results.get('img_path')
        if path is None:
            return results
        try:
            with Image.open(path) as image:
                results['img'] = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
        except OSError as err:
            raise UserError(f'{path} cannot be read as an image: {err}') from err
        return results


@TRANSFORMS.register_module()
class SquarePicture:
    """Bring ``img`` to a square of ``size`` pixels by bicubic interpolation.

    Args:
        size: of a side.
        way: 'resize' (published, "resize-naive") whatever its shape, 'crop' the middle of the
            longer side, or 'letterbox' with bars of ``fill`` at the shorter one.
        fill: red, green and blue from 0 to 255, such as the mean of a tower's normalisation.

    Raises:
        ValueError: on another ``way``.
    """

    def __init__(self, size: int, way: str = 'resize', fill: tuple[int, ...] = (127, 127, 127)):
        if way not in WAYS:
            raise ValueError(f'way={way!r} does not exist; choose one of {WAYS}')
        self.size, self.way, self.fill = size, way, tuple(fill)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image, ImageOps

        if 'img' not in results:
            return results
        image, size = Image.fromarray(results['img']), (self.size, self.size)
        if self.way == 'letterbox':
            side = max(image.size)
            square = Image.new('RGB', (side, side), self.fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.way == 'crop':
            image = ImageOps.fit(image, size, Image.BICUBIC)
        elif image.size != size:
            image = image.resize(size, Image.BICUBIC)
        results['img'] = np.asarray(image)
        return results


@TRANSFORMS.register_module()
class PackConversation:
    """Make of a sample what the model takes: ``inputs``, (3, H, W) in uint8 or None, and a data
    sample with its ``turns``."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results.get('img')
        if image is not None:
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        meta = dict(turns=results.get('turns') or [], img_path=results.get('img_path'))
        return dict(inputs=image, data_samples=BaseDataElement(metainfo=meta))
