"""Folders of volumes, one for each patient: ``type='vmamba_mm.VolumeDataset'``."""

import os
import random
from collections.abc import Sequence

from mmengine.dataset import BaseDataset

from vmamba_mm.errors import UserError
from vmamba_mm.registry import DATASETS


@DATASETS.register_module()
class VolumeDataset(BaseDataset):
    """A folder for each case, with a file for each channel and one for the mask.

    ``data_root/CASE/CASE-t2w.nii.gz`` is the file ``'{case}-t2w.nii.gz'`` of a case. All that
    MONAI's ``LoadImage`` reads is taken: NIfTI, DICOM, NRRD, NumPy.

    Args:
        data_root: the folder of the cases.
        images: the files of a case, one for each channel of the volume, in order.
        mask: that of the mask; None where there is none.
        ann_file: a list of cases, one in each line, below ``data_root``; '' for all folders.
        split: None for all of them, or which part of ``fractions``, 'train', 'val' or 'test', after
            a shuffle by ``seed`` of the sorted names.
        fractions: of the cases, of the three parts.
        seed: of the shuffle.
        **kwargs: of mmengine's BaseDataset: ``pipeline``, ``metainfo``, ``test_mode``, ...

    Raises:
        ValueError: on a value that is not allowed.
        UserError: if there is no case, or a file of one is missing.
    """

    def __init__(self, data_root: str, images: Sequence[str], mask: str | None = None,
                 ann_file: str = '', split: str | None = None,
                 fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 42, **kwargs):
        if split not in (None, 'train', 'val', 'test'):
            raise ValueError(f"split={split!r} does not exist; choose 'train', 'val', 'test' or "
                             'None')
        if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) > 1 + 1e-6:
            raise ValueError('fractions must be three numbers of at least 0, together at most 1, '
                             f'got {fractions!r}')
        self.images, self.mask = tuple(images), mask
        for name in (*self.images, *([mask] if mask else [])):
            try:
                name.format(case='')
            except (KeyError, IndexError, ValueError) as err:
                raise ValueError("images and mask are names of files, such as "
                                 "'{case}-t1c.nii.gz', with {case} for the folder of a case and "
                                 f'no other braces, got {name!r}') from err
        self.split, self.fractions, self.seed = split, tuple(fractions), seed
        super().__init__(data_root=data_root, ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        cases = self._part(self._list_cases())
        if not cases:
            raise UserError(f'{self.data_root} has no case'
                            + (f' for split={self.split!r}' if self.split else '')
                            + ': it must hold a folder for each')
        return [self._find_files(case) for case in cases]

    def _list_cases(self):
        if self.ann_file:
            try:
                with open(self.ann_file, encoding='utf-8') as file:
                    return [line.strip() for line in file if line.strip()]
            except OSError as err:
                raise UserError(f'the list of cases {self.ann_file} cannot be read '
                                f'({err.strerror}): put it there, or change ann_file= of the data '
                                "set, which is '' for all folders") from err
        if not os.path.isdir(self.data_root):
            raise UserError(f'the folder {self.data_root} of the volumes does not exist: put it '
                            'there, or change data_root= of the data set')
        return sorted(entry.name for entry in os.scandir(self.data_root) if entry.is_dir())

    def _part(self, cases):
        if self.split is None:
            return cases
        random.Random(self.seed).shuffle(cases)
        train, val, _ = self.fractions
        first, second = (round(len(cases) * share) for share in (train, train + val))
        last = round(len(cases) * sum(self.fractions))
        return cases[dict(train=slice(first), val=slice(first, second),
                          test=slice(second, last))[self.split]]

    def _find_files(self, case):
        paths = [os.path.join(self.data_root, case, name.format(case=case))
                 for name in (*self.images, *([self.mask] if self.mask else []))]
        for path in paths:
            if not os.path.exists(path):
                raise UserError(f'the case {case} has no file {path}: put it there, or change '
                                'images= and mask= of the data set')
        count = len(self.images)
        return dict(case=case, files=paths[:count], mask_file=(paths[count:] or [None])[0])
