"""From a config to a model or a runner: devices, processes, loaders and hooks."""

import copy
import os

from vmamba_mm.config import scopes_of, type_name
from vmamba_mm.errors import UserError

#: Of DistributedDataParallel, unless a config has model_wrapper_cfg. As views of the buckets that
#: the processes exchange, gradients need not be copied back from these one by one.
DDP_OPTIONS = dict(broadcast_buffers=False, gradient_as_bucket_view=True)


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
    """Turn fp16 off in evaluation on a CPU: mmengine would take bf16, which changes the metrics."""
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
    if not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            DDP_OPTIONS, type='vmamba_mm.BucketSharingDDP',
            find_unused_parameters=cfg.get('find_unused_parameters', False))
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
    cfg.model_wrapper_cfg['device_ids'] = None
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
    """Set what the task's own tools add to configs, and no persistent workers without workers."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is None:
            continue
        if task is not None and task.loader:
            loader.setdefault('pin_memory', has_gpu())
            for key, value in task.loader.items():
                loader.setdefault(key, copy.deepcopy(value))
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
