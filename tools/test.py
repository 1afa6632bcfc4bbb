"""Evaluate a checkpoint on the test data of its config."""

from copy import deepcopy

import _checks
import _cli
import _images

EXAMPLES = """\
  python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth
  python tools/test.py CONFIG vssm1_tiny_0230s_ckpt_epoch_264.pth    (an official file)
  python tools/test.py CONFIG CHECKPOINT --tta --out metrics.json
  python tools/test.py CONFIG CHECKPOINT --show-dir drawn
  tools/dist_test.sh CONFIG CHECKPOINT 8               (8 GPUs of one machine)"""


def parse_args():
    parser = _cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='a checkpoint file or web address, official or ours')
    _cli.add_weights_option(parser)
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation: the config\'s tta_pipeline, else (for '
                        'classification and detection) the image and its mirror image')
    parser.add_argument('--out', metavar='FILE',
                        help='write the metrics (*.json) or the predictions (*.pkl; for '
                        'segmentation a folder of label maps)')
    parser.add_argument('--show-dir', metavar='FOLDER', help='draw the predictions there, each '
                        'picture where its image lies in the data')
    _images.add_channels_option(parser)
    parser.add_argument('--work-dir', metavar='FOLDER',
                        help='where the log goes (default: the config\'s, else work_dirs/<name of '
                        'the config>)')
    _cli.add_common_options(parser)
    args = parser.parse_args()
    _images.check_channels_option(args)
    return args


def set_tta(cfg, task):
    """Wrap the model and replace the pipeline, with a mirrored copy where no recipe is given."""
    dataset = next(d for _, d in _cli.datasets_of(cfg.test_dataloader.dataset, ''))
    if cfg.get('tta_pipeline') is None or cfg.get('tta_model') is None:
        if task not in ('cls', 'det'):
            raise _cli.UserError('--tta: the config has no tta_pipeline and tta_model')
        print('The config has no test-time augmentation: using the image and its mirror image')
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        pack = deepcopy(dataset.pipeline[-1])
        if task == 'det':
            keys = pack.get('meta_keys') or ('img_id', 'img_path', 'ori_shape', 'img_shape',
                                             'scale_factor')
            pack['meta_keys'] = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
            cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(
                nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
        else:
            cfg.tta_model = dict(type='AverageClsScoreTTA')
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]),
                            dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    if cfg.get('data_preprocessor') is not None:
        # mmengine would give it to the wrapper, and the model would see images not normalised.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


STOCK_DRAWING = {'cls': 'VisualizationHook', 'det': 'DetVisualizationHook',
                 'seg': 'SegVisualizationHook'}


def set_show_dir(cfg, task, folder, channels):
    """Draw by our hook in place of the stock ones, with their settings; leave any other."""
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    hook = cfg.default_hooks.get('visualization') or dict(type=STOCK_DRAWING[task], interval=1)
    if _cli.type_name(hook) != STOCK_DRAWING[task]:
        hook.update({'enable': True, 'out_dir': folder} if task == 'cls' else {'draw': True})
        cfg.visualizer['save_dir'] = folder
        return
    ours = dict(type='vmamba_mm.DrawHook', task=task, out_dir=folder, channels=channels,
                visualizer=cfg.get('visualizer'))
    left_out = ('type', 'priority', 'enable', 'draw', 'out_dir', 'test_out_dir', 'backend_args')
    if task == 'cls':
        settings = {k: v for k, v in hook.items() if k not in (*left_out, 'interval')}
        ours.update(interval=hook.get('interval', 5000), settings=settings)
    else:
        ours.update(settings={k: hook[k] for k in ('show', 'wait_time') if k in hook})
        if 'score_thr' in hook:
            ours['score_thr'] = hook['score_thr']
    cfg.default_hooks['visualization'] = ours


def set_out(cfg, task, path):
    """Refuse an unknown kind of output before the hours of evaluation."""
    if path.endswith('.json'):
        return
    if task == 'seg':
        if path.endswith(('.pkl', '.pickle')):
            raise _cli.UserError('--out: for segmentation give a *.json file (metrics) or a '
                                 'folder (label maps)')
        evaluator = cfg.test_evaluator
        if isinstance(evaluator, list | tuple):
            evaluator = evaluator[0]
        evaluator.update(output_dir=path, keep_results=True)
    elif not path.endswith(('.pkl', '.pickle')):
        raise _cli.UserError(f'--out takes a *.json (metrics) or *.pkl (predictions) file, not '
                             f'{path}')


def add_dump(runner, task, path):
    if task == 'det':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    runner.test_evaluator.metrics.append(Dump(out_file_path=path))


def main():
    args = parse_args()
    cfg = _cli.load_config(args.config, args.cfg_options)
    task = _cli.find_task(cfg)
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise _cli.UserError(f'the config {args.config} has no test_dataloader and test_evaluator')
    _checks.check_testing(cfg)
    _cli.set_work_dir(cfg, args)
    from vmamba_mm.checkpoints.files import fetch, read_checkpoint
    from vmamba_mm.mm.loading import register
    register(args.weights)
    checkpoint = str(fetch(args.checkpoint))
    read_checkpoint(checkpoint, args.weights)
    _cli.check_data_paths(cfg, 'test_dataloader')
    _cli.evaluate_in_fp32_without_gpu(cfg)
    _cli.start_processes(cfg, args.launcher)
    _cli.set_loader_defaults(cfg, task)
    cfg.load_from, cfg.resume = checkpoint, False
    if task is None and (args.show_dir or args.out and not args.out.endswith('.json')):
        raise _cli.UserError('--show-dir and --out (but for *.json) are for models of mmpretrain, '
                             f'mmdet and mmseg, not for model type={cfg.model.type!r}')
    if args.out:
        set_out(cfg, task, args.out)
    if args.show_dir:
        set_show_dir(cfg, task, args.show_dir, args.channels)
    if args.tta:
        set_tta(cfg, task)
    # The averaged weights are what a checkpoint holds: EMAHook would only average them once more.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or []
                        if _cli.type_name(hook) != 'EMAHook']
    _cli.add_hooks(cfg, 'CheckDataHook', 'StrictLoadHook', 'ProgressHook')
    runner = _cli.build_runner(cfg)
    if args.out and args.out.endswith(('.pkl', '.pickle')):
        add_dump(runner, task, args.out)
    metrics = runner.test()
    if runner.rank == 0:
        for name, value in metrics.items():
            print(f'{name} = {float(value):.4g}')
        if args.out and args.out.endswith('.json'):
            from mmengine.fileio import dump
            dump({k: float(v) for k, v in metrics.items()}, args.out, indent=2)
        if args.out:
            print(f'Written: {args.out}')


if __name__ == '__main__':
    _cli.run(main)
