"""Reading samples: the same random numbers for the same place in the run, and named files.

How this works: a DataLoader calls ``dataset.__getitems__`` with all indices of a batch, if there is
such a method. :func:`install_reader` sets it to a :class:`SampleReader`, in the process that makes
the loader and before its workers start, so that every sample of any data set goes through it.

How to test a change: tests/mm/test_data.py, and the tests of bad data in
tests/tools/test_tools_errors.py, which run whole trainings on it.
"""

import os
from functools import partial

import numpy as np
import torch
from mmengine.hooks import Hook
from torch.utils.data import IterableDataset

from vmamba_mm.errors import UserError
from vmamba_mm.mm.labels import (
    add_mask_checks,
    check_instances,
    check_num_classes,
    segmentation_classes,
)
from vmamba_mm.mm.sources import IMAGE, SECOND_KEY, VIDEO, source_of
from vmamba_mm.registry import HOOKS

FILE_KEYS = {IMAGE.path_key: IMAGE.name, SECOND_KEY: IMAGE.name, 'seg_map_path': IMAGE.name,
             VIDEO.path_key: VIDEO.name}
# A step that loads raises these when it lacks a package or is wrong itself; the file is sound.
_NOT_THE_FILE = (ImportError, AttributeError, NameError)


def seed_all(*words, cuda=True):
    """Seed python, numpy and torch from a tuple of whole numbers."""
    import random

    a, b, c = (int(x) for x in np.random.SeedSequence(words).generate_state(3))
    random.seed(a)
    np.random.seed(b)
    if cuda:
        torch.manual_seed(c)
    else:
        torch.default_generator.manual_seed(c)


class SampleReader:
    """Set as ``dataset.__getitems__``, which a DataLoader calls with all indices of a batch.

    An index may come as ``(index, seed words)``: then the random generators are seeded for this
    sample alone, so that its augmentation depends neither on the worker that happens to read it
    nor on what was read before. A file that cannot be read is named.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, indices):
        return [self.read(i) for i in indices]

    def read(self, index):
        if isinstance(index, tuple):
            index, words = index
            seed_all(*words, cuda=False)
        try:
            return self.dataset[index]
        except UserError:
            raise
        except Exception as err:
            problem = find_bad_file(self.dataset, index)
            if problem:
                raise UserError(problem) from err
            raise


def find_bad_file(dataset, index):
    """One line about the file of a sample that its pipeline fails on, or None if it does not.

    The pipeline runs once more, step by step; call this for a sample that could not be made.
    """
    try:
        info = dataset.get_data_info(index)
    except Exception:
        return None
    for key, name in FILE_KEYS.items():
        path = info.get(key)
        if isinstance(path, str) and '://' not in path and not os.path.isfile(path):
            return f'the {name} {path} does not exist (the data set lists it)'
    try:
        apply_steps(steps_of(dataset, index), info)
    except UserError as err:
        return str(err)
    return None


def steps_of(dataset, index=0):
    """The transforms that make a sample, of the innermost data set that it is from."""
    while hasattr(dataset, 'dataset') or hasattr(dataset, 'datasets'):
        inner_index = getattr(dataset, '_get_ori_dataset_idx', lambda i: i)(index)
        if hasattr(dataset, 'datasets'):
            which, index = inner_index
            dataset = dataset.datasets[which]
        else:
            dataset, index = dataset.dataset, inner_index
    return getattr(getattr(dataset, 'pipeline', None), 'transforms', ())


def apply_steps(steps, info):
    """Run the steps of a pipeline one by one.

    Args:
        steps: transforms; the first ones, until there is an ``img`` (of a video ``clips``), load
            the image.
        info: of the sample, with ``img_path`` or ``video_path`` where it is a file.

    Returns:
        What the last step gives, and the image as it was loaded, (H, W) or (H, W, C), or the clips
        of a video, (V, T, H, W, C); None if the sample had one from the beginning, or no step loads
        any.

    Raises:
        UserError: with the file and the step that failed. The file is called corrupt only if it
            was a step that loads it.
    """
    loaded, data, source = None, info, source_of(info)
    path = info.get(source.path_key) or 'without a file name'
    for step in steps:
        loading = loaded is None and source.data_key not in data
        labels = 'Annotations' in type(step).__name__ and info.get('seg_map_path')
        try:
            data = step(data)
        except UserError:
            raise
        except Exception as err:
            if loading and not isinstance(err, _NOT_THE_FILE):
                raise UserError(_unreadable(path, step, err)) from err
            if labels and not is_image(labels):
                raise UserError(_unreadable(labels, step, err)) from err
            size = f', {source.size(loaded)}' if loaded is not None else ''
            raise UserError(f'the step {type(step).__name__} of the pipeline fails on the '
                            f'{source.name} {path}{size}: {type(err).__name__}: {err}') from err
        if data is None:
            if loading:
                raise UserError(_unreadable(path, step))
            return None, loaded  # to be replaced by another sample
        if loading and source.data_key in data:
            loaded = np.array(data[source.data_key])  # some steps write into it
    return data, loaded


def load_image(steps, path, source=IMAGE):
    """An image as the loader of a pipeline reads it, (H, W) or (H, W, C).

    Of a video, whose ``source`` is :data:`vmamba_mm.mm.sources.VIDEO`, its frames as one image.

    Raises:
        UserError: if it cannot, or if there is no step that loads.
    """
    for i in range(1, len(steps) + 1):
        _, loaded = apply_steps(steps[:i], {source.path_key: str(path)})
        if loaded is not None:
            return source.picture(loaded)
    raise UserError(f'the test pipeline has no step that loads {path}, such as {source.loader}')


def _unreadable(path, step, err=''):
    """Why a step cannot load a file; corrupt is what nothing else can read either."""
    if isinstance(err, OSError) and err.errno is not None:
        return f'the image {path} cannot be read: {err.strerror}'
    # OpenCV's own errors are of a class 'error'.
    is_informative = str(err) and str(path) not in str(err) and type(err).__name__ != 'error'
    reason = f' ({type(err).__name__}: {err})' if is_informative else ''
    if is_image(path):
        return (f'the image {path} is of a kind that {type(step).__name__} of the pipeline does '
                f'not read{reason}; convert it, or change how the pipeline reads')
    return (f'the image {path} is corrupt, or no image: {type(step).__name__} of the pipeline '
            f'cannot read it{reason}; delete it or replace it with a sound copy')


def is_image(path):
    """Whether OpenCV or Pillow can read a file, whatever its dtype and number of channels."""
    import mmcv

    for backend in ('cv2', 'pillow'):
        try:
            with open(path, 'rb') as f:
                if mmcv.imfrombytes(f.read(), flag='unchanged', backend=backend) is not None:
                    return True
        except Exception:  # whatever a decoder says to it
            continue
    return False


def install_reader(loader):
    """Read a loader's samples through ``SampleReader``; its workers must not have started."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        return False
    dataset.__getitems__ = SampleReader(dataset)
    return True


def check_classes(dataset):
    """Refuse class folders without images, about which mmpretrain only warns."""
    folders = getattr(dataset, 'folder_to_idx', None)
    if not folders or not hasattr(dataset, 'get_gt_labels'):
        return
    present = set(int(label) for label in dataset.get_gt_labels())
    empty = sorted(name for name, label in folders.items() if label not in present)
    if empty:
        root, files = getattr(dataset, 'img_prefix', ''), _files_of(dataset)
        listed = ', '.join(empty[:5]) + (', ...' if len(empty) > 5 else '')
        raise UserError(f'{len(empty)} class folder(s) without {files} in {root}: {listed}; add '
                        f'{files} or delete the folder')


def _files_of(dataset):
    return f'{getattr(dataset, "source", IMAGE).name}s'


def check_dataset(dataset, check_labels=None):
    """Refuse a data set without images; ``check_labels(dataset)`` may know why it has none."""
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset):
        check_classes(dataset)
    if check_labels is not None:
        check_labels(dataset)
    if len(dataset) == 0:
        where = getattr(dataset, 'data_prefix', None) or getattr(dataset, 'data_root', '')
        raise UserError(f'the data set {type(dataset).__name__} has no {_files_of(dataset)}: '
                        f'{where}')


def measures_masks(loop):
    """Whether a loop's evaluation computes an AP of instance masks from COCO annotations."""
    metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', ())
    return any('segm' in (getattr(metric, 'metrics', None) or ()) for metric in metrics)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Data that cannot be right end the run with one clear line.

    Before it starts: empty data sets and class folders, another number of classes than the
    model's, objects without masks. As they are loaded: corrupt images, and masks of another size
    than their image or with values that the model does not know.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner):
        number, ignored = segmentation_classes(runner.model)
        for name in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{name}_loop')
            if not hasattr(loop, 'dataloader'):
                continue
            dataset = loop.dataloader.dataset
            check_dataset(dataset, partial(
                check_num_classes, runner.model, place=f'{name}_dataloader.dataset',
                warn=runner.logger.warning))
            if install_reader(loop.dataloader):
                check_instances(dataset, measures_masks(loop))
                add_mask_checks(dataset, number, ignored)
