"""Folders of images for restoration: ``type='vmamba_mm.RestorationDataset'``."""

import os
from pathlib import Path

from mmengine.dataset import BaseDataset

from vmamba_mm.errors import UserError
from vmamba_mm.mm.sources import IMAGE
from vmamba_mm.registry import DATASETS


@DATASETS.register_module()
class RestorationDataset(BaseDataset):
    """Good images, and beside each the degraded one, or none where the pipeline degrades.

    Images of several folders come together, as in DF2K, which is DIV2K and Flickr2K::

        dict(type='vmamba_mm.RestorationDataset', data_root='data',
             gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR'],
             lq=['DIV2K/DIV2K_train_LR_bicubic/X2', 'Flickr2K/Flickr2K_LR_bicubic/X2'],
             lq_name='{}x2', pipeline=...)

    Args:
        data_root: before all folders.
        gt: the folder of good images, or several. Folders in it are looked through.
        lq: that of degraded ones for each; None for none.
        lq_name: of a degraded image, without its suffix, with ``{}`` for that of the good one.
        **kwargs: of mmengine's BaseDataset: ``pipeline``, ``metainfo``, ``test_mode``, ...

    Raises:
        ValueError: on a value that is not allowed.
        UserError: if a folder is missing or has no images, or a degraded image is missing.
    """

    def __init__(self, data_root: str, gt: str | list[str], lq: str | list[str] | None = None,
                 lq_name: str = '{}', **kwargs):
        gt = [gt] if isinstance(gt, str) else list(gt)
        lq = [lq] if isinstance(lq, str) else lq
        if not gt or lq is not None and len(lq) != len(gt):
            raise ValueError(f'gt must name a folder at least, and lq one for each, got {gt!r} and '
                             f'{lq!r}')
        if lq_name.count('{}') != 1 or '{' in lq_name.replace('{}', ''):
            raise ValueError(f"lq_name must be such as '{{}}x2', got {lq_name!r}")
        self.gt, self.lq, self.lq_name = gt, lq, lq_name
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        found = []
        for i, folder in enumerate(self.gt):
            root = Path(self.data_root, folder)
            degraded = None if self.lq is None else self._by_stem(Path(self.data_root, self.lq[i]))
            for path in self._images(root):
                info = dict(gt_path=str(path))
                if degraded is not None:
                    name = path.relative_to(root)
                    key = str(name.with_name(self.lq_name.format(name.stem)))
                    if key not in degraded:
                        raise UserError(
                            f'{path} has no degraded image {Path(self.data_root, self.lq[i], key)}'
                            ".*: put it there, or change lq= and lq_name= of the data set")
                    info['lq_path'] = degraded[key]
                found.append(info)
        return found

    def _images(self, folder):
        if not folder.is_dir():
            raise UserError(f'the folder {folder} of images does not exist: put it there, or '
                            'change data_root=, gt= and lq= of the data set')
        images = sorted(
            path for path in folder.rglob('*') if path.suffix.lower() in IMAGE.suffixes
            and not any(part.startswith('.') for part in path.relative_to(folder).parts))
        if not images:
            raise UserError(f'the folder {folder} has no images')
        return images

    def _by_stem(self, folder):
        return {os.path.splitext(path.relative_to(folder))[0]: str(path)
                for path in self._images(folder)}
