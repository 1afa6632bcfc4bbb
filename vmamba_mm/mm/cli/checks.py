"""Settings of a config that cannot work, found before anything is loaded or built."""

import difflib
import math
import os
from pathlib import Path

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.configs import datasets_of

# These fetch their data themselves, so that a missing folder is no mistake.
DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')

# --- rules for single values ----------------------------------------------------------------------

def _is_int(value, low):
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_length(value):
    """mmengine takes whatever int() takes."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return not isinstance(value, bool) and isinstance(value, int | float) \
        and math.isfinite(value) and value >= 1 and value == int(value)


def _is_rate(value):
    return not isinstance(value, bool) and isinstance(value, int | float) \
        and math.isfinite(value) and value >= 0


COUNT = (lambda v: _is_int(v, 1), 'an int of at least 1')
WORKERS = (lambda v: _is_int(v, 0), 'an int of at least 0 (0: no worker processes)')
LENGTH = (_is_length, 'a whole number of at least 1')
RATE = (_is_rate, 'a finite number of at least 0')
LOADER = dict(batch_size=COUNT, num_workers=WORKERS)
INTERVAL = (lambda v: v == math.inf or _is_length(v), LENGTH[1])
LOOP = dict(max_epochs=LENGTH, max_iters=LENGTH, val_interval=INTERVAL)
OPTIMIZER = dict(lr=RATE, weight_decay=RATE)


def _check_values(cfg, node, place, rules):
    if not isinstance(node, dict):
        raise UserError(f'{_name(cfg)} has {place}={node!r}; it must be a dict')
    for key, (allowed, expected) in rules.items():
        value = node.get(key)
        if value is not None and not allowed(value):
            raise UserError(f'{_name(cfg)} has {place}.{key}={value!r}; it must be {expected}: '
                            f'change it there or with --cfg-options {place}.{key}=...')


def _name(cfg):
    return f'the config {cfg.filename}' if cfg.filename else 'the config'


# --- parts of a config ----------------------------------------------------------------------------

def check_training(cfg):
    """The loaders, the loop, the optimizer, the heads and the metric of a training."""
    for name in ('train_dataloader', 'val_dataloader'):
        _check_values(cfg, cfg.get(name) or {}, name, LOADER)
        _check_class_folders(cfg, name)
    _check_values(cfg, cfg.train_cfg, 'train_cfg', LOOP)
    _check_optimizers(cfg, cfg.get('optim_wrapper'), 'optim_wrapper')
    _check_values(cfg, cfg.get('auto_scale_lr') or {}, 'auto_scale_lr', dict(base_batch_size=COUNT))
    _check_heads(cfg, cfg.model, 'model')
    _check_mixing(cfg)
    if cfg.get('val_cfg') is not None:
        _check_topk(cfg, 'val_evaluator')
    if cfg.model.get('head') and cfg.model.head.get('cal_acc'):
        _check_k(cfg, cfg.model.head, 'model.head')


def check_testing(cfg):
    _check_values(cfg, cfg.test_dataloader, 'test_dataloader', LOADER)
    _check_class_folders(cfg, 'test_dataloader')
    _check_heads(cfg, cfg.model, 'model')
    _check_topk(cfg, 'test_evaluator')


def _check_optimizers(cfg, node, place):
    """``node`` may hold one optimizer, or several under names of its own."""
    if not isinstance(node, dict):
        return
    optimizer = node.get('optimizer')
    if isinstance(optimizer, dict):
        place = f'{place}.optimizer'
        _check_values(cfg, optimizer, place, OPTIMIZER)
        if isinstance(optimizer.get('type'), str):
            _check_optimizer_type(cfg, optimizer.type, place)
        return
    for key, value in node.items():
        _check_optimizers(cfg, value, f'{place}.{key}')


def _check_optimizer_type(cfg, name, place):
    from mmengine.registry import OPTIMIZERS

    # mmengine goes on with None in the place of a type that it does not find.
    with OPTIMIZERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        if registry.get(name) is not None:
            return
        names = {*registry.module_dict, *OPTIMIZERS.module_dict}
    close = difflib.get_close_matches(type_name(name), names, n=3, cutoff=0.5) or ['AdamW', 'SGD']
    raise UserError(f"{_name(cfg)} names {place}.type='{name}', which no optimizer registry has; "
                    f'did you mean {" or ".join(close)}?')


def _check_heads(cfg, node, place):
    """The number of classes of every head, where the config gives one."""
    if isinstance(node, dict):
        if place.rstrip('.0123456789').endswith('head'):
            _check_values(cfg, node, place, dict(num_classes=(
                lambda v: not isinstance(v, int | float | str) or _is_int(v, 1), COUNT[1])))
        for key, value in node.items():
            _check_heads(cfg, value, f'{place}.{key}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            _check_heads(cfg, value, f'{place}.{i}')


def _num_classes(cfg):
    """The number of classes of a classifier's head; None if it is not one plain number."""
    head = cfg.model.get('head')
    number = head.get('num_classes') if isinstance(head, dict) else None
    return number if isinstance(number, int) else None


def _check_mixing(cfg):
    """Mixup and CutMix make labels for as many classes as the preprocessor says."""
    inside = cfg.model.get('data_preprocessor')
    place = 'data_preprocessor' if not inside else 'model.data_preprocessor'
    theirs = (inside or cfg.get('data_preprocessor') or {}).get('num_classes')
    ours = _num_classes(cfg)
    mixes = isinstance(cfg.model.get('train_cfg'), dict) and cfg.model.train_cfg.get('augments')
    if mixes and isinstance(theirs, int) and ours is not None and theirs != ours:
        raise UserError(f'{_name(cfg)} has model.head.num_classes={ours} and {place}.num_classes='
                        f'{theirs}, which Mixup and CutMix make labels for; both must be the '
                        f'number of classes: --cfg-options model.head.num_classes={ours} '
                        f'{place}.num_classes={ours}')


def _check_topk(cfg, name):
    evaluators = cfg.get(name) or []
    if isinstance(evaluators, dict):
        evaluators = evaluators.get('metrics', evaluators)
    single = isinstance(evaluators, dict)
    for i, metric in enumerate([evaluators] if single else evaluators):
        if isinstance(metric, dict) and type_name(metric) == 'Accuracy':
            _check_k(cfg, metric, name if single else f'{name}.{i}')


def _check_k(cfg, node, place):
    topk, classes = node.get('topk'), _num_classes(cfg)
    many = topk if isinstance(topk, list | tuple) else (topk,)
    if classes is None or not all(isinstance(k, int) for k in many) or max(many) <= classes:
        return
    possible = ','.join(str(k) for k in many if k <= classes) or '1'
    raise UserError(f'{_name(cfg)} has {place}.topk={topk}, and the model knows {classes} '
                    f'class{"es" * (classes > 1)} only: give --cfg-options '
                    f'"{place}.topk=({possible},)"')


def _check_class_folders(cfg, loader):
    """ImageNet's data set on folders of one's own: say how to name their classes."""
    dataset = (cfg.get(loader) or {}).get('dataset')
    if not isinstance(dataset, dict):
        return
    named = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    if type_name(dataset) != 'ImageNet' or named or dataset.get('ann_file') \
            or dataset.get('split') == 'test' or not dataset.get('with_label', True) \
            or not isinstance(prefix, str):
        return
    root = Path(os.path.expanduser(dataset.get('data_root') or ''))
    folder = root / prefix
    if (root / 'meta' / f'{dataset.get("split")}.txt').is_file() or not folder.is_dir():
        return
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes or len(classes) == 1000:
        return
    shown = classes if len(classes) <= 20 else [*classes[:3], '...']
    options = [f'{name}.dataset.metainfo=dict(classes={shown})' for name in
               ('train_dataloader', 'val_dataloader', 'test_dataloader') if cfg.get(name)]
    options = [f'"{option}"' for option in options]
    options.append(f'model.head.num_classes={len(classes)}')
    if 'num_classes' in (cfg.get('data_preprocessor') or {}):
        options.append(f'data_preprocessor.num_classes={len(classes)}')
    if len(classes) < 5:
        options += [f'{name}.topk=1' for name in ('val_evaluator', 'test_evaluator')
                    if type_name(cfg.get(name) or {}) == 'Accuracy']
    raise UserError(f'{folder} has {len(classes)} class folder(s) ({", ".join(shown)}), and the '
                    f'data set ImageNet of the config ({loader}.dataset) has 1000 classes: name '
                    f'yours in the config, or with --cfg-options {" ".join(options)}')


# --- files ----------------------------------------------------------------------------------------

def check_data_paths(cfg, *loaders):
    """Every folder and annotation file that the config names has to be there."""
    for loader in loaders:
        if cfg.get(loader) is None:
            continue
        for name, dataset in datasets_of(cfg[loader].dataset, f'{loader}.dataset'):
            _check_dataset_paths(name, dataset)
        evaluators = cfg.get(loader.replace('dataloader', 'evaluator')) or []
        for metric in evaluators if isinstance(evaluators, list | tuple) else [evaluators]:
            path = metric.get('ann_file')
            if path and '://' not in path and not os.path.exists(path):
                raise UserError(f'the annotation file {path} of {type_name(metric)} '
                                f'({loader.replace("dataloader", "evaluator")}.ann_file) does '
                                'not exist')


def _check_dataset_paths(name, dataset):
    if dataset.get('backend_args') or type_name(dataset) in DOWNLOADING:
        return
    root = dataset.get('data_root') or ''
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    entries = [('data_root', root)]
    entries += [('ann_file', dataset.get('ann_file'))]
    if type_name(dataset) == 'ImageNet' and dataset.get('split') and not prefixes \
            and not dataset.get('ann_file'):
        entries.append(('split', dataset.split))  # a folder, as of no other data set
    entries += [(f'data_prefix.{k}'.rstrip('.'), v) for k, v in prefixes.items()]
    for key, value in entries:
        if not isinstance(value, str) or not value or '://' in value + root:
            continue
        path = os.path.expanduser(value if key == 'data_root' else os.path.join(root, value))
        if not os.path.exists(path):
            where = '' if os.path.isabs(path) else f' (looked in {os.getcwd()})'
            raise UserError(f'the data set is missing: {path} does not exist{where}; it is '
                            f'{name}.{key} of the config: put the data there, or give its place '
                            f'with --cfg-options {name}.data_root=FOLDER')
        if os.path.isdir(path) and not any(os.scandir(path)):
            raise UserError(f'the data set is empty: {path} ({name}.{key} of the config) has no '
                            'files')
