"""What the tools share: options, the config, the model and one-line errors."""

import argparse
import atexit
import copy
import difflib
import os
import re
import sys
import traceback
from pathlib import Path

os.environ.setdefault('PIP_REQUIRE_VIRTUALENV', '1')

try:
    import vmamba_mm  # noqa: F401
except ModuleNotFoundError:  # not installed: use the checkout that this file is in
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from vmamba_mm.config import scopes_of, type_name  # noqa: E402
from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import EXTRAS, missing_package, prepare_mm  # noqa: E402

TASKS = ('cls', 'det', 'seg')
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
# These fetch their data themselves, so that a missing folder is no mistake.
DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


# --- command line ---------------------------------------------------------------------------

def make_parser(doc, examples):
    return argparse.ArgumentParser(
        description=doc, epilog=f'examples:\n{examples}\n\nA mistake in the input ends with one '
        'line that says what is wrong;\n--traceback, or VMAMBA_TRACEBACK=1, shows where it was '
        'found.', formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_options(parser, launcher=True):
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='change settings of the config, for example '
                        'train_dataloader.batch_size=4 model.backbone.arch=small_s1l20')
    parser.add_argument('--traceback', action='store_true', help=argparse.SUPPRESS)
    if launcher:
        parser.add_argument('--launcher', choices=LAUNCHERS, default='none',
                            help='how several processes were started; tools/dist_*.sh set '
                            'pytorch (default: none)')
        # Passed by old launchers; torchrun sets LOCAL_RANK.
        parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)


def add_weights_option(parser):
    parser.add_argument('--weights', choices=('auto', 'model', 'model_ema'), default='auto',
                        help='which weights of a training file that holds two sets: model_ema '
                        'are the averaged ones, whatever the trainer calls them; auto takes them '
                        'where they are present, else model (default: auto)')


def add_device_option(parser):
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')


def shorten(items, most=5):
    """Them in one line, or the first few and how many more."""
    left = len(items) - most
    return ', '.join(map(str, items[:most])) + (f' and {left} more' if left > 0 else '')


def wants_traceback():
    return ('--traceback' in sys.argv
            or os.environ.get('VMAMBA_TRACEBACK', '0') not in ('', '0'))


def run(main):
    """Call ``main`` and turn a user's mistake into one line on stderr and exit code 1."""
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
        print('stopped', file=sys.stderr)
    except Exception as err:
        message = explain(err)
        if message is None:
            raise
        if wants_traceback():
            traceback.print_exc()
        rank = os.environ.get('RANK')
        who = f' (process {rank})' if rank else ''
        print(f'error{who}: {message}', file=sys.stderr, flush=True)
        code = 1
    if _close_process_group():
        # All is done and cleaned up. A helper thread of several processes' communication that
        # meets a dying interpreter can still abort it (exit code -6), so do not wait for that.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _close_process_group():
    """Whether there was one."""
    dist = getattr(sys.modules.get('torch'), 'distributed', None)
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    dist.destroy_process_group()
    return True


# --- errors ---------------------------------------------------------------------------------

def explain(err):
    """One line for an error that the user can cure, None for one that needs a traceback."""
    message = _explain(err)
    return None if message is None else ' '.join(message.split())


def _explain(err):
    text = _own_message(err)
    if isinstance(err, UserError):
        return str(err)
    if isinstance(err, ModuleNotFoundError) and err.name in (*EXTRAS, 'mmcv._ext'):
        return str(missing_package(err.name))
    if isinstance(err, OSError):
        if err.filename is not None:
            return f'{err.strerror}: {err.filename}'
        return text if isinstance(err, FileNotFoundError) else None
    if isinstance(err, KeyError) and 'registry' in text:
        return _explain_type(text)
    if type(err).__name__ == 'OutOfMemoryError':
        return ('the GPU memory is used up; lower train_dataloader.batch_size, train with --amp '
                'or set model.backbone.with_cp=True')
    if isinstance(err, TypeError) and 'unexpected keyword argument' in text:
        return f'the config gives a setting that its type does not have: {text}'
    if isinstance(err, ValueError | TypeError) and _raised_in(err, 'vmamba_mm'):
        return text
    if isinstance(err, ValueError | TypeError) and _raised_in(err, 'torch.optim'):
        return f'optim_wrapper.optimizer of the config is not allowed: {text}'
    if isinstance(err, AssertionError) and text.startswith('self.begin_'):
        return f'an EMAHook of the config begins after the end of the training: {text}'
    if 'TTA of instance segmentation' in text:
        return 'mmdet has no test-time augmentation for models with masks: test without --tta'
    if 'end should be larger than begin' in text:
        return (f'a schedule of param_scheduler begins when the training is over ({text}): the '
                'run is shorter than its warm-up; change param_scheduler or train longer')
    if 'parameters that were not used in producing loss' in text:
        return ('some parameters have no part in the loss, which several processes do not allow: '
                'let model.backbone.out_indices name the outputs in use, or set '
                'find_unused_parameters=True')
    channels = re.search(r'to have (\d+) channels, but got (\d+) channels instead', text)
    if channels:
        return (f'the images have {channels[2]} channels, and the model takes {channels[1]}: set '
                'model.backbone.in_channels, and mean and std of the data_preprocessor, to the '
                "images' channels, or let the pipeline load others (LoadImageFromFile.color_type)")
    if 'need at least one array to concatenate' in text:
        return _explain_empty(err)
    known = ('Found 0 files in subfolders of', 'Failed to load `ann_file`',
             "doesn't match the number of specified classes")
    if any(k in text for k in known):
        return text
    return None


def _explain_empty(err):
    """mmengine cannot pack a data set of no samples: look for it in the frames of the error."""
    from vmamba_mm.mm.labels import check_categories

    frame = err.__traceback__
    while frame is not None:
        dataset = frame.tb_frame.f_locals.get('self')
        if hasattr(dataset, 'ann_file') and hasattr(dataset, 'metainfo'):
            try:
                check_categories(dataset, 'the dataset', lambda line: None)
            except UserError as found:
                return str(found)
            return (f'the data set {type(dataset).__name__} ({dataset.ann_file}) has no samples, '
                    'or its filter_cfg leaves none')
        frame = frame.tb_next
    return None


def _own_message(err):
    """An error's text, without the traceback that a DataLoader worker sends along."""
    text = str(err.args[0]) if isinstance(err, KeyError) and err.args else str(err)
    if text.startswith('Caught ') and 'DataLoader worker' in text:
        text = text.strip().splitlines()[-1].partition(': ')[2]
    return text


def _raised_in(err, package):
    """Whether the innermost frame of an error is in a package or module."""
    frame = err.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f'{frame.tb_frame.f_globals.get("__name__", "")}.'.startswith(f'{package}.')


def _explain_type(text):
    found = re.search(r'(\S+) is not in the (.+?) registry', text)
    if not found:
        return text
    name, registry = found[1].strip('\'"'), found[2].rpartition('::')[2]
    close = difflib.get_close_matches(name.rpartition('.')[2], _registered(registry), n=3)
    hint = f'; did you mean {" or ".join(close)}?' if close else ''
    return f"the config names type='{name}', which no {registry} registry has{hint}"


def _registered(registry_name):
    from mmengine.registry import Registry, root

    names = set()

    def collect(registry):
        names.update(registry.module_dict)
        for child in registry.children.values():
            collect(child)

    for value in vars(root).values():
        if isinstance(value, Registry) and value.name == registry_name:
            collect(value)
    return names


# --- config ---------------------------------------------------------------------------------

def load_config(path, options=()):
    """Read a config file, or a stock one as ``mmdet::folder/name.py``, and apply KEY=VALUE."""
    prepare_mm()
    from _options import parse_options, say_what_is_lost
    from mmengine.config import Config

    try:
        if '::' in path:
            from mmengine.hub import get_config
            cfg = get_config(path)
        else:
            if not os.path.isfile(path):
                raise UserError(f'the config {path} does not exist{_similar_files(path)}')
            cfg = Config.fromfile(path)
    except UserError:
        raise
    except Exception as err:
        raise UserError(f'the config {path} cannot be read: {type(err).__name__}: {err}') from err
    if options:
        hooks = list(cfg.get('custom_hooks') or ())
        try:
            cfg.merge_from_dict(parse_options(options))
        except (KeyError, TypeError, IndexError, AttributeError, AssertionError) as err:
            raise UserError(f'--cfg-options {" ".join(options)}: {err}') from err
        say_what_is_lost(hooks, cfg.get('custom_hooks'), '--cfg-options custom_hooks=')
    if cfg.get('model') is None:
        raise UserError(f'the config {path} has no model')
    find_task(cfg)
    if not isinstance(cfg.model.get('type'), str) or cfg.model.type.count('.') > 1:
        # In mmengine's pure Python style nothing looks names up in a scope, but what the tools add
        # to the config does.
        cfg.default_scope = cfg.get('default_scope') or 'mmengine'
    return cfg


def _similar_files(path):
    folder = Path(path).parent
    if not folder.is_dir():
        return f' (no folder {folder})'
    close = difflib.get_close_matches(Path(path).name, [p.name for p in folder.iterdir()], n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def find_task(cfg):
    """'cls', 'det' or 'seg', whose package is installed; None for a model of no such package.

    It follows from the model's type where that names a package or is a class (of a package or
    derived from one of its), else from default_scope, which is set where the config has none.

    Raises:
        UserError: if there is no such scope or model, as in a config of another OpenMMLab package.
    """
    tasks = {scope: task for scope, task in EXTRAS.items() if task in TASKS}
    kind, default = cfg.model.get('type'), cfg.get('default_scope')
    scopes = [*scopes_of(kind), cfg.model.get('_scope_'), default]
    scope = next((s for s in scopes if s in tasks), None)
    found = kind
    if scope is None and (kind is None or isinstance(kind, str)):
        found = _find_class(kind, default)
        scope = next((s for s in scopes_of(found) if s in tasks), None)
    if found is None or default and not _is_scope(default):
        raise UserError(
            f"the config's model type={kind!r} and default_scope={default!r} are of no task that "
            f'is known here: default_scope is {", ".join(map(repr, tasks))}, or, in a config of '
            "'mmengine', the model's type begins with one of them, as 'mmdet.MaskRCNN' does")
    if scope is None:
        return None
    from vmamba_mm.mm.compat import require_working
    require_working(scope)
    if not default:
        cfg.default_scope = scope
    return tasks[scope]


def _is_scope(name):
    """Whether a default_scope is that of a package, or of a registry that was made."""
    from importlib.util import find_spec

    from mmengine.registry import MODELS

    return name in MODELS.children or name.isidentifier() and find_spec(name) is not None


def _find_class(kind, scope):
    """What a registry holds under a type's name, or None."""
    import logging

    from mmengine.registry import MODELS

    logging.disable(logging.WARNING)  # mmengine's advice to install a package
    try:
        with MODELS.switch_scope_and_registry(scope or 'mmengine') as registry:
            return registry.get(kind)
    except Exception:  # of packages that are not installed, or of modules that do not exist
        return None
    finally:
        logging.disable(logging.NOTSET)


def set_work_dir(cfg, args):
    """--work-dir, else the config's own, else work_dirs/<name of the config>."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config.rpartition('::')[2]).stem)


def datasets_of(dataset, name):
    """Every innermost data set of a config with its place in it."""
    if dataset.get('dataset') is not None:
        yield from datasets_of(dataset.dataset, f'{name}.dataset')
    elif dataset.get('datasets') is not None:
        for i, inner in enumerate(dataset.datasets):
            yield from datasets_of(inner, f'{name}.datasets.{i}')
    else:
        yield name, dataset


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
    if dataset.get('split') and not prefixes and not dataset.get('ann_file'):
        entries.append(('split', dataset.split))  # the folder of an ImageNet's split
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


def has_gpu():
    from mmengine.device import get_device

    return get_device() not in ('cpu', 'mps')


def choose_device(name):
    """--device, else a GPU if there is one."""
    from mmengine.device import get_device

    if not name:
        return get_device()
    if name.startswith('cuda') and not has_gpu():
        raise UserError(f'--device {name}: torch finds no GPU here')
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except Exception as err:
        there = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        raise UserError(f'--device {name}: torch cannot compute there ({str(err).splitlines()[0]}'
                        f'); choose one of {", ".join(there)}') from err
    return name


def evaluate_in_fp32_without_gpu(cfg):
    """On a CPU mmengine takes fp16=True for bf16, which would change the metrics."""
    loops = [name for name in ('val_cfg', 'test_cfg') if (cfg.get(name) or {}).get('fp16')]
    if loops and not has_gpu():
        for name in loops:
            cfg[name].fp16 = False
        print('No GPU: evaluating in fp32 (the config asks for fp16)')


def start_processes(cfg, launcher):
    """Set the launcher; without a GPU, join the processes by gloo, which mmengine does not."""
    cfg.launcher = launcher
    if launcher == 'none':
        return
    import torch

    names = {'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
             'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
             'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}[launcher]
    missing = [n for n in names if n not in os.environ]
    if missing:
        how = {'slurm': 'srun', 'mpi': 'mpirun'}.get(launcher, 'tools/dist_train.sh or torchrun')
        raise UserError(f'--launcher {launcher} needs {", ".join(missing)} in the environment: '
                        f'start the processes with {how}')
    rank, world, local = (int(os.environ[n]) for n in names)
    if has_gpu():
        count = torch.cuda.device_count()
        if launcher != 'slurm' and count and local >= count:
            raise UserError(f'process {rank} is number {local + 1} of this machine, which has '
                            f'{count} GPU(s): start at most one process for each GPU')
        return
    for name, value in (('RANK', rank), ('WORLD_SIZE', world), ('LOCAL_RANK', local),
                        ('MASTER_ADDR', '127.0.0.1'), ('MASTER_PORT', 29500)):
        os.environ.setdefault(name, str(value))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel', broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper
    cfg.sync_bn = None
    sync_to_plain_batch_norm(cfg.model)


def sync_to_plain_batch_norm(node):
    """SyncBN runs on GPUs only."""
    if isinstance(node, dict):
        # torch's class is SyncBatchNorm, mmcv's are SyncBatchNorm and NaiveSyncBatchNorm.
        if type_name(node) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm', 'NaiveSyncBatchNorm'):
            node['type'] = 'BN'
        for value in node.values():
            sync_to_plain_batch_norm(value)
    elif isinstance(node, list | tuple):
        for value in node:
            sync_to_plain_batch_norm(value)


def set_loader_defaults(cfg, task):
    """What mmpretrain's own tools add to its configs, and no persistent workers without workers."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is None:
            continue
        if task == 'cls':
            loader.setdefault('pin_memory', has_gpu())
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if not loader.get('num_workers', 0):
            loader['persistent_workers'] = False
            loader.pop('prefetch_factor', None)


def add_hooks(cfg, *types):
    """Add hooks of vmamba_mm unless the config has them with its own settings."""
    hooks = list(cfg.get('custom_hooks') or [])
    present = {type_name(hook) for hook in hooks if next(scopes_of(hook), None) == 'vmamba_mm'}
    hooks += [dict(type=f'vmamba_mm.{t}') for t in types if t not in present]
    cfg.custom_hooks = hooks


def model_settings(cfg):
    """A copy of the config's model, its preprocessor included: some models change what they get."""
    settings = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        settings.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    return settings


def build_model(cfg):
    """The config's model alone, on the CPU; its weights are neither initialised nor loaded."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return revert_sync_batchnorm(MODELS.build(model_settings(cfg)))


def build_runner(cfg):
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)
