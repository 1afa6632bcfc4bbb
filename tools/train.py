"""Train a model from a config: classification, detection or segmentation."""

import os

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/train.py configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py
  python tools/train.py CONFIG --work-dir work_dirs/try1 --resume
  python tools/train.py CONFIG --cfg-options train_dataloader.batch_size=16 --auto-scale-lr
  python tools/train.py CONFIG --cfg-options load_from=FILE --allow-mismatch '^head'
  tools/dist_train.sh CONFIG 8 --amp                   (8 GPUs of one machine)"""


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('--work-dir', metavar='FOLDER',
                        help='where checkpoints, logs and curves.png go (default: the config\'s, '
                        'else work_dirs/<name of the config>)')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from a checkpoint; without a value, or with "auto", from the '
                        'newest complete one in the work dir, if any')
    parser.add_argument('--allow-mismatch', nargs='+', default=[], metavar='PATTERN',
                        help='start from a load_from that fits in part: regular expressions of '
                        'the names of parameters that may differ and then start anew, for example '
                        "'^head' (added to the config's allow_mismatch)")
    parser.add_argument('--amp', action='store_true',
                        help='mixed precision (needs a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by the real batch size over the config\'s '
                        'auto_scale_lr.base_batch_size')
    cli.add_common_options(parser)
    return parser.parse_args()


def set_amp(cfg, wants_amp):
    """AmpOptimWrapper refuses the CPU: use it where there is a GPU only."""
    wrapper = cfg.get('optim_wrapper')
    if wrapper is None:
        return
    name = type_name(wrapper) or 'OptimWrapper'
    is_amp = name == 'AmpOptimWrapper'
    if wants_amp and not cli.has_gpu():
        raise UserError('--amp needs a GPU, and torch finds none here; train without --amp')
    if wants_amp and not is_amp:
        if name != 'OptimWrapper':
            raise UserError(f'--amp cannot be used with optim_wrapper.type={name}')
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    if is_amp and not cli.has_gpu():
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            wrapper.pop(key, None)
        print('No GPU: training in fp32 (OptimWrapper in place of the config\'s AmpOptimWrapper)')


def set_resume(cfg, wanted):
    """Decide what to load. The seed comes along: mmengine would shuffle anew without one."""
    from vmamba_mm.checkpoints.files import fetch, read_checkpoint
    from vmamba_mm.mm.hooks.checkpoint import find_resumable
    from vmamba_mm.mm.loading import register
    from vmamba_mm.zoo import SCHEME

    likely = cli.families_of(cfg)
    register(likely=likely)  # mmengine reads checkpoints safely from here on
    if wanted is None and cfg.get('resume'):
        wanted = cfg.get('load_from') or 'auto'
    cfg.resume = False
    if wanted == 'auto':
        wanted = find_resumable(cfg.work_dir)
        if wanted is None:
            print(f'Nothing to resume in {cfg.work_dir}: starting from the beginning')
    if wanted is None:
        start = cfg.get('load_from')
        if start and start.startswith(('http://', 'https://', SCHEME)):
            start = cfg.load_from = str(fetch(start))
        if start and '://' not in start:
            read_checkpoint(start, likely=likely)
        return
    checkpoint = read_checkpoint(wanted)
    meta = checkpoint.get('meta') or {}
    if 'optimizer' not in checkpoint or 'iter' not in meta:
        raise UserError(f'{wanted} holds weights only, no state of a training: start from '
                        f'them with --cfg-options load_from={wanted}')
    cfg.resume, cfg.load_from = True, wanted
    print(f'Resuming from {wanted}')
    if meta.get('seed') is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=meta['seed'])


def set_allowed(cfg, patterns):
    """Names of parameters that StrictLoadHook lets differ: the config's and the option's."""
    from vmamba_mm.mm.hooks.strict_load import check_patterns

    if patterns and not cfg.get('load_from'):
        raise UserError('--allow-mismatch needs a checkpoint to start from: '
                        '--cfg-options load_from=FILE')
    allowed = [*check_patterns(cfg.get('allow_mismatch') or (), 'allow_mismatch of the config'),
               *check_patterns(patterns, '--allow-mismatch')]
    if allowed:
        cfg.allow_mismatch = allowed


def set_hooks(cfg):
    hooks = dict(cfg.get('default_hooks') or {})
    checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint is not None:
        if type_name(checkpoint) == 'CheckpointHook':
            checkpoint['type'] = 'vmamba_mm.AtomicCheckpointHook'
        hooks['checkpoint'] = checkpoint
    cfg.default_hooks = hooks
    cli.add_hooks(cfg, 'ExactResumeHook', 'CheckDataHook', 'StrictLoadHook', 'MissedValHook',
                  'ProgressHook', 'CurvesHook')


def set_visualizer(cfg):
    """Scalars go to a JSON file, which the curves are drawn from, and to TensorBoard."""
    from importlib.util import find_spec

    visualizer = cfg.get('visualizer') or dict(type='Visualizer')
    backends = list(visualizer.get('vis_backends') or [])
    present = {type_name(b) for b in backends}
    wanted = ['LocalVisBackend']
    if find_spec('tensorboard'):
        wanted.append('TensorboardVisBackend')
    else:
        print('No TensorBoard scalars: pip install tensorboard to have them')
    backends += [dict(type=t) for t in wanted if t not in present]
    visualizer['vis_backends'] = backends
    cfg.visualizer = visualizer


def set_auto_scale(cfg):
    scale = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' not in scale:
        raise UserError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
    cfg.auto_scale_lr = dict(scale, enable=True)


def main():
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    if cfg.get('train_dataloader') is None or cfg.get('train_cfg') is None:
        raise UserError(f'the config {args.config} has no train_dataloader and train_cfg: '
                        'it is no training recipe')
    cli.check_training(cfg)
    cli.set_work_dir(cfg, args)
    set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        set_auto_scale(cfg)
    cli.check_data_paths(cfg, 'train_dataloader', 'val_dataloader')
    cli.evaluate_in_fp32_without_gpu(cfg)
    cli.start_processes(cfg, args.launcher)
    cli.set_loader_defaults(cfg, cli.find_task(cfg))
    set_resume(cfg, args.resume)
    set_allowed(cfg, args.allow_mismatch)
    set_hooks(cfg)
    set_visualizer(cfg)
    runner = cli.build_runner(cfg)
    runner.train()
    if runner.rank == 0:
        print(f'Done. Checkpoints, logs and curves.png are in {os.path.abspath(cfg.work_dir)}')


if __name__ == '__main__':
    cli.run(main)
