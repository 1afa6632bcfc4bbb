"""Data sets of clouds, in the files that PointMamba and its like are trained on."""

import json
import os
import pickle
from collections.abc import Mapping, Sequence

import numpy as np
from mmengine.dataset import BaseDataset

from vmamba_mm.checkpoints.formats import safe_numpy_types
from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require
from vmamba_mm.mm.sources import CLOUD
from vmamba_mm.registry import DATASETS

SPLITS = 'train', 'test'
#: Variants of ScanObjectNN: the folder, and the end of the files' names.
SCANS = dict(obj_bg=('main_split', ''), obj_only=('main_split_nobg', ''),
             pb_t50_rs=('main_split', '_augmentedrot_scale75'))

#: The file with the classes of ModelNet40, and what it has.
NAMES = 'modelnet40_shape_names.txt'
MODELNET40 = (
    'airplane', 'bathtub', 'bed', 'bench', 'bookshelf', 'bottle', 'bowl', 'car', 'chair', 'cone',
    'cup', 'curtain', 'desk', 'door', 'dresser', 'flower_pot', 'glass_box', 'guitar', 'keyboard',
    'lamp', 'laptop', 'mantel', 'monitor', 'night_stand', 'person', 'piano', 'plant', 'radio',
    'range_hood', 'sink', 'sofa', 'stairs', 'stool', 'table', 'tent', 'toilet', 'tv_stand', 'vase',
    'wardrobe', 'xbox')
#: Clouds of each class in the test of a few-shot task.
FEW_SHOT_TEST = 20


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
    source = CLOUD

    def __init__(self, data_root: str, split: str = 'train', **kwargs):
        if split not in self.splits:
            raise ValueError(f'split={split!r} does not exist; choose one of {self.splits}')
        self.split = split
        self._has_names = 'classes' in (kwargs.get('metainfo') or {})
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        infos = self.list_clouds()
        if not infos:
            raise UserError(f'{self.data_root} has no cloud for split={self.split!r}')
        return infos

    def list_clouds(self) -> list[dict]:
        """A dict for each cloud, with ``path`` or ``points``, and its labels."""
        raise NotImplementedError

    def name_classes(self, classes: Sequence[str]) -> None:
        """Set the names of the classes, unless ``metainfo`` gave them."""
        if not self._has_names:
            self._metainfo['classes'] = tuple(classes)

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

    METAINFO = dict(classes=MODELNET40)

    def list_clouds(self) -> list[dict]:
        if os.path.isfile(self.path(NAMES)):
            self.name_classes(self.read_lines(NAMES))
        packed = self.path(f'modelnet40_{self.split}_8192pts_fps.dat')
        if os.path.isfile(packed):
            return _infos(packed, *_unpickle(packed, list, 2))
        numbers = {name: i for i, name in enumerate(self.read_lines(NAMES))}
        infos = []
        for name in self.read_lines(f'modelnet40_{self.split}.txt'):
            kind = name.rpartition('_')[0]
            if kind not in numbers:
                raise UserError(f'{name} in modelnet40_{self.split}.txt is of no class in {NAMES}')
            infos.append(dict(path=self.path(kind, f'{name}.txt'), gt_label=numbers[kind]))
        return infos


@DATASETS.register_module()
class ModelNetFewShot(_PointDataset):
    """A few-shot task of ModelNet40, 5 or 10 classes of which 10 or 20 clouds are trained on, and
    20 of the test set measured, in ten folds.

    The public lists are files such as ``5way_10shot/0.pkl``, with lists 'train' and 'test' of
    (points, number of the class in the task, class). With ``draw`` tasks are drawn by
    :func:`draw_task` from ModelNet40 itself: others than the public ones, the same each time.

    Args:
        data_root: the folder of the public lists, or with ``draw`` that of :class:`ModelNet40`.
        way: classes of the task.
        shot: clouds of each to train on.
        fold: of the task, from 0 to 9.
        draw: draw the task in place of reading it.
        split, kwargs: as of the others.

    Raises:
        UserError: if a file is missing or broken, or a class has too few clouds.
    """

    def __init__(self, data_root: str, way: int, shot: int, fold: int, split: str = 'train',
                 draw: bool = False, **kwargs):
        self.way, self.shot, self.fold, self.draw = way, shot, fold, draw
        super().__init__(data_root, split, **kwargs)

    def list_clouds(self) -> list[dict]:
        return self._draw() if self.draw else self._read()

    def _draw(self):
        sets = {split: ModelNet40(self.data_root, split) for split in SPLITS}
        labels = {split: [int(data.get_data_info(i)['gt_label']) for i in range(len(data))]
                  for split, data in sets.items()}
        try:
            classes, numbers = draw_task(labels, self.way, self.shot, self.fold)
        except ValueError as err:
            raise UserError(f'{self.data_root}: {err}') from err
        data = sets[self.split]
        names = data.metainfo['classes']
        self.name_classes([names[c] for c in classes])
        infos = [data.get_data_info(i) for i in numbers[self.split]]
        return [dict(info, gt_label=classes.index(int(info['gt_label']))) for info in infos]

    def _read(self):
        path = self.path(f'{self.way}way_{self.shot}shot', f'{self.fold}.pkl')
        task = _unpickle(path, dict, None)
        if self.split not in task:
            raise UserError(f'{path} has no list {self.split!r}')
        try:
            clouds, labels, kinds = zip(*task[self.split], strict=True)
            numbers = {int(label): int(kind) for label, kind in zip(labels, kinds, strict=True)}
        except (TypeError, ValueError) as err:
            raise UserError(f'{path} has a list {self.split!r} that is not of (points, number of '
                            'the class in the task, class): fetch the file anew') from err
        if max(numbers.values()) < len(MODELNET40):
            self.name_classes([MODELNET40[kind] for _, kind in sorted(numbers.items())])
        return _infos(f'{path}, {self.split}', clouds, labels)


def draw_task(labels: Mapping[str, Sequence[int]], way: int, shot: int, fold: int,
              count: int = FEW_SHOT_TEST) -> tuple[list[int], dict[str, list[int]]]:
    """Draw a few-shot task: classes, and of each some clouds to train on and some to measure, as
    Point-BERT (arXiv 2111.14819) does.

    What is drawn depends on the arguments alone, and not on the machine.

    Args:
        labels: of the clouds of 'train' and 'test'.
        way, shot, fold: as of :class:`ModelNetFewShot`.
        count: clouds of each class in the test.

    Returns:
        The classes, and of each split the numbers of its clouds in an order drawn.

    Raises:
        ValueError: if there are too few classes, or a class has too few clouds.
    """
    # This generator, unlike NumPy's newer ones, gives the same numbers in all versions.
    rng = np.random.RandomState([way, shot, fold])
    present = sorted(set(labels['train']))
    if not 1 <= way <= len(present):
        raise ValueError(f'there are {len(present)} classes, and way={way} are to be drawn')
    classes = rng.permutation(present)[:way].tolist()
    numbers: dict[str, list[int]] = {}
    for split, wanted in (('train', shot), ('test', count)):
        own = np.asarray(labels[split])
        chosen = []
        for kind in classes:
            there = np.flatnonzero(own == kind)
            if not 1 <= wanted <= len(there):
                raise ValueError(f'class {kind} has {len(there)} clouds in {split!r}, and {wanted} '
                                 'are to be drawn')
            chosen += rng.permutation(there)[:wanted].tolist()
        numbers[split] = rng.permutation(chosen).tolist()
    return classes, numbers


@DATASETS.register_module()
class ScanObjectNN(_PointDataset):
    """Scans of objects, 15 classes, 2048 points, in HDF5 files with ``data`` and ``label``.

    Args:
        variant: 'obj_bg' with the background, ``main_split/training_objectdataset.h5``; 'obj_only'
            without it, from ``main_split_nobg``; 'pb_t50_rs', the hardest, moved, turned and
            scaled, ``main_split/training_objectdataset_augmentedrot_scale75.h5``.
        data_root, split, kwargs: as of the others.
    """

    METAINFO = dict(classes=(
        'bag', 'bin', 'box', 'cabinet', 'chair', 'desk', 'display', 'door', 'shelf', 'table', 'bed',
        'pillow', 'sink', 'sofa', 'toilet'))

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
        return _infos(path, clouds, labels)


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
                folder, file = os.path.split(name)
                folder = os.path.basename(folder)
                if folder not in folders:
                    raise UserError(f'{name} in {path} is of no category in '
                                    'synsetoffset2category.txt')
                infos.append(dict(path=self.path(folder, f'{file}.txt'), category=folders[folder]))
        return sorted(infos, key=lambda info: (info['category'], info['path']))


def _infos(path: str, clouds: Sequence, labels: Sequence) -> list[dict]:
    """A dict for each cloud of a file that holds a whole data set.

    Raises:
        UserError: if there are not as many labels as clouds.
    """
    if len(clouds) != len(labels):
        raise UserError(f'{path} has {len(clouds)} clouds and {len(labels)} labels: fetch the file '
                        'anew')
    return [dict(points=np.asarray(points, np.float32)[..., :3], gt_label=int(np.ravel(label)[0]),
                 path=f'{path}, number {i}')
            for i, (points, label) in enumerate(zip(clouds, labels, strict=True))]


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
