"""Data sets of clouds, in the files that PointMamba and its like are trained on."""

import json
import os
import pickle

import numpy as np
from mmengine.dataset import BaseDataset

from vmamba_mm.checkpoints.formats import safe_numpy_types
from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require
from vmamba_mm.registry import DATASETS

SPLITS = 'train', 'test'
#: Variants of ScanObjectNN: the folder, and the end of the files' names.
SCANS = dict(obj_bg=('main_split', ''), obj_only=('main_split_nobg', ''),
             pb_t50_rs=('main_split', '_augmentedrot_scale75'))


class _PointDataset(BaseDataset):
    """What the data sets have in common.

    Args:
        data_root: the folder of the files.
        split: 'train' or 'test'.
        **kwargs: of mmengine's BaseDataset: ``pipeline``, ``metainfo``, ``test_mode``, ...

    Raises:
        ValueError: on another split.
        UserError: if a file is missing or broken.
    """

    splits = SPLITS

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in self.splits:
            raise ValueError(f'split={split!r} does not exist; choose one of {self.splits}')
        self.split = split
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        infos = self.list_clouds()
        if not infos:
            raise UserError(f'{self.data_root} has no cloud for split={self.split!r}')
        return infos

    def list_clouds(self) -> list[dict]:
        """A dict for each cloud, with ``path`` or ``points``, and its labels."""
        raise NotImplementedError

    def path(self, *names: str) -> str:
        return os.path.join(self.data_root, *names)

    def read_lines(self, *names: str) -> list[str]:
        try:
            with open(self.path(*names), encoding='utf-8') as file:
                lines = [line.strip() for line in file if line.strip()]
        except OSError as err:
            raise UserError(f'{self.path(*names)} cannot be read ({err.strerror}): put '
                            f'{type(self).__name__} there, or change data_root= of the data '
                            'set') from err
        if not lines:
            raise UserError(f'{self.path(*names)} is empty')
        return lines


@DATASETS.register_module()
class ModelNet40(_PointDataset):
    """ModelNet40 as ``modelnet40_normal_resampled``: 10000 points of each object.

    ``modelnet40_shape_names.txt`` has the classes, ``modelnet40_train.txt`` and ``_test.txt`` the
    names, such as ``night_stand_0001``, whose file is ``night_stand/night_stand_0001.txt``. Where
    ``modelnet40_train_8192pts_fps.dat`` is there, which the public code makes of them, all clouds
    are read from it, with 8192 points each.
    """

    def list_clouds(self) -> list[dict]:
        packed = self.path(f'modelnet40_{self.split}_8192pts_fps.dat')
        if os.path.isfile(packed):
            clouds, labels = _unpickle(packed, list, 2)
            return [dict(points=np.asarray(points)[:, :3], gt_label=int(np.ravel(label)[0]),
                         path=f'{packed}, number {i}')
                    for i, (points, label) in enumerate(zip(clouds, labels, strict=True))]
        classes = self.read_lines('modelnet40_shape_names.txt')
        numbers = {name: i for i, name in enumerate(classes)}
        infos = []
        for name in self.read_lines(f'modelnet40_{self.split}.txt'):
            kind = name.rpartition('_')[0]
            if kind not in numbers:
                raise UserError(f'{name} in modelnet40_{self.split}.txt is of no class in '
                                'modelnet40_shape_names.txt')
            infos.append(dict(path=self.path(kind, f'{name}.txt'), gt_label=numbers[kind]))
        return infos


@DATASETS.register_module()
class ModelNetFewShot(_PointDataset):
    """A few-shot task of ModelNet40: ``5way_10shot/0.pkl`` with lists 'train' and 'test' of
    (points, number of the class in the task, class), as the public code draws them.

    Args:
        way: classes of the task, 5 or 10.
        shot: clouds of each to train on, 10 or 20; there are 20 of each in the test.
        fold: of the task, from 0 to 9.
        data_root, split, kwargs: as of the others.
    """

    def __init__(self, data_root: str, way: int, shot: int, fold: int, split: str = 'train',
                 **kwargs):
        self.file = os.path.join(f'{way}way_{shot}shot', f'{fold}.pkl')
        super().__init__(data_root, split, **kwargs)

    def list_clouds(self) -> list[dict]:
        path = self.path(self.file)
        task = _unpickle(path, dict, None)
        if self.split not in task:
            raise UserError(f'{path} has no list {self.split!r}')
        return [dict(points=np.asarray(points)[:, :3], gt_label=int(label),
                     path=f'{path}, {self.split} {i}')
                for i, (points, label, _) in enumerate(task[self.split])]


@DATASETS.register_module()
class ScanObjectNN(_PointDataset):
    """Scans of objects, 15 classes, 2048 points, in HDF5 files with ``data`` and ``label``.

    Args:
        variant: 'obj_bg' with the background, ``main_split/training_objectdataset.h5``; 'obj_only'
            without it, from ``main_split_nobg``; 'pb_t50_rs', the hardest, moved, turned and
            scaled, ``main_split/training_objectdataset_augmentedrot_scale75.h5``.
        data_root, split, kwargs: as of the others.
    """

    def __init__(self, data_root: str, variant: str, split: str = 'train', **kwargs):
        if variant not in SCANS:
            raise ValueError(f'variant={variant!r} does not exist; choose one of {tuple(SCANS)}')
        self.variant = variant
        super().__init__(data_root, split, **kwargs)

    def list_clouds(self) -> list[dict]:
        folder, end = SCANS[self.variant]
        start = dict(train='training', test='test')[self.split]
        path = self.path(folder, f'{start}_objectdataset{end}.h5')
        if not os.path.isfile(path):
            raise UserError(f'{path} does not exist: put ScanObjectNN there, or change data_root= '
                            'of the data set')
        require('h5py')
        import h5py

        try:
            with h5py.File(path) as file:
                clouds, labels = file['data'][:], file['label'][:]
        except (OSError, KeyError) as err:
            raise UserError(f'{path} cannot be read as a file of ScanObjectNN: '
                            f'{str(err).splitlines()[0]}') from err
        return [dict(points=points.astype(np.float32), gt_label=int(label),
                     path=f'{path}, number {i}')
                for i, (points, label) in enumerate(zip(clouds, labels, strict=True))]


@DATASETS.register_module()
class ShapeNet55(_PointDataset):
    """ShapeNet-55 for pre-training: ``ShapeNet-55/train.txt`` names files of ``shapenet_pc``, each
    with 8192 points in NumPy's format."""

    def list_clouds(self) -> list[dict]:
        return [dict(path=self.path('shapenet_pc', name))
                for name in self.read_lines('ShapeNet-55', f'{self.split}.txt')]


@DATASETS.register_module()
class ShapeNetPart(_PointDataset):
    """ShapeNetPart, ``shapenetcore_partanno_segmentation_benchmark_v0_normal``: 16 categories of
    objects, 50 parts.

    ``synsetoffset2category.txt`` has the categories and their folders,
    ``train_test_split/shuffled_train_file_list.json`` the files: x, y, z, three of the normal, and
    the part in each line (``LoadPoints(part_column=6)``).
    """

    splits = 'train', 'val', 'trainval', 'test'

    def list_clouds(self) -> list[dict]:
        folders = {}
        for line in self.read_lines('synsetoffset2category.txt'):
            folders[line.split()[-1]] = len(folders)
        infos = []
        for part in ('train', 'val') if self.split == 'trainval' else (self.split,):
            path = self.path('train_test_split', f'shuffled_{part}_file_list.json')
            try:
                with open(path, encoding='utf-8') as file:
                    names = json.load(file)
            except (OSError, ValueError) as err:
                raise UserError(f'{path} cannot be read as a list of files: {err}') from err
            for name in names:  # shape_data/03624134/d8f9...
                *_, folder, file = name.split('/')
                if folder not in folders:
                    raise UserError(f'{name} in {path} is of no category in '
                                    'synsetoffset2category.txt')
                infos.append(dict(path=self.path(folder, f'{file}.txt'), category=folders[folder]))
        return sorted(infos, key=lambda info: (info['category'], info['path']))


class _ArrayUnpickler(pickle.Unpickler):
    """Lists, numbers and NumPy's arrays; nothing of a file runs."""

    def find_class(self, module, name):
        found = safe_numpy_types().get(f'{module}.{name}')
        if found is None:
            raise UserError(f'it holds {module}.{name}, which could run code')
        return found


def _unpickle(path: str, kind: type, length: int | None):
    try:
        with open(path, 'rb') as file:
            content = _ArrayUnpickler(file).load()
    except OSError as err:
        raise UserError(f'{path} cannot be read ({err.strerror}): put it there, or change '
                        'data_root= of the data set') from err
    except UserError as err:
        raise UserError(f'{path} is not safe to load: {err}') from err
    except Exception as err:
        raise UserError(f'{path} is no pickled file of clouds: {err}') from err
    if not isinstance(content, kind | tuple) or length not in (None, len(content)):
        raise UserError(f'{path} holds a {type(content).__name__}, not clouds and their labels')
    return content
