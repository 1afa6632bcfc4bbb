"""The crop of images that diffusion models are trained on."""

from typing import Any

import numpy as np
from PIL import Image

from vmamba_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class HalvingCenterCrop:
    """A square from the middle of the image, shrunk to a size: by halves as long as it goes, then
    by bicubic interpolation (the crop of ADM, arXiv 2105.05233).

    Args:
        size: pixels of a side.

    Takes and gives ``img``, (H, W, C) in uint8; a smaller image is enlarged.

    Raises:
        ValueError: on another size.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f'size must be an int of at least 1, got {size!r}')
        self.size = size

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results['img']
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        while min(image.size) >= 2 * self.size:
            image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size),
                             Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in image.size)
        cut = np.array(image)[top:top + self.size, left:left + self.size]
        results['img'] = cut.reshape(self.size, self.size, -1)
        results['img_shape'] = cut.shape[:2]
        return results
