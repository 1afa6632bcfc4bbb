"""Reading samples: the same random numbers for the same place in the run, and named files."""

import os
from functools import partial

import numpy as np
import torch
from mmengine.hooks import Hook
from torch.utils.data import IterableDataset

from vmamba_mm.compat import UserError
from vmamba_mm.engine.labels import (
    add_mask_checks,
    check_instances,
    check_num_classes,
    segmentation_classes,
)
from vmamba_mm.registry import HOOKS

FILE_KEYS = ('img_path', 'seg_map_path')


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
        except Exception as err:
            problem = find_bad_file(self.dataset, index)
            if problem:
                raise UserError(problem) from err
            raise


def find_bad_file(dataset, index):
    """One line about the unreadable file of a sample, or None if its files are sound."""
    try:
        info = dataset.get_data_info(index)
    except Exception:
        return None
    for key in FILE_KEYS:
        path = info.get(key)
        if not isinstance(path, str) or '://' in path:
            continue
        if not os.path.isfile(path):
            return f'the image {path} does not exist (the data set lists it)'
        if not is_image(path):
            return f'the image {path} is corrupt; delete it or replace it with a sound copy'
    return None


def is_image(path):
    import mmcv

    try:
        with open(path, 'rb') as f:
            return mmcv.imfrombytes(f.read(), flag='unchanged') is not None
    except Exception:
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
        root = getattr(dataset, 'img_prefix', '')
        listed = ', '.join(empty[:5]) + (', ...' if len(empty) > 5 else '')
        raise UserError(f'{len(empty)} class folder(s) without images in {root}: {listed}; add '
                        'images or delete the folder')


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
        raise UserError(f'the data set {type(dataset).__name__} has no images: {where}')


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
