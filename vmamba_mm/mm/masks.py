"""Masks of two classes: ``type='vmamba_mm.BinaryMask'``."""

import numpy as np
from mmcv.transforms import BaseTransform

from vmamba_mm.errors import UserError
from vmamba_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class BinaryMask(BaseTransform):
    """Black and white masks as class numbers, 0 and 1, after mmseg's ``LoadAnnotations``.

    White, 255, is what mmseg leaves out of loss and metrics. A mask without values above 1 holds
    the numbers already; in any other, values of at least 128 become 1, as those that a compressed
    file or a resizing has made of black and white.

    Raises:
        UserError: on a mask of several channels.
    """

    def transform(self, results: dict) -> dict:
        mask = results['gt_seg_map']
        if mask.ndim != 2:
            raise UserError(f'the mask {results.get("seg_map_path")} has the shape {mask.shape}: '
                            'expected one channel; save it as a greyscale image')
        if mask.max(initial=0) > 1:
            results['gt_seg_map'] = (mask >= 128).astype(np.uint8)
        return results
