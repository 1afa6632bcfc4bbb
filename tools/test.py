"""Evaluate a checkpoint on the test data of its config."""

from copy import deepcopy

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.cli import images as image_files
from vmamba_mm.mm.tasks import list_scopes

EXAMPLES = """\
  python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth
  python tools/test.py CONFIG vmamba_mm://vmamba/tiny_s1l8    (published weights)
  python tools/test.py CONFIG CHECKPOINT --tta --out metrics.json
  python tools/test.py CONFIG CHECKPOINT --show-dir drawn
  tools/dist_test.sh CONFIG CHECKPOINT 8               (8 GPUs of one machine)"""


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='a checkpoint file or web address, official or ours')
    cli.add_weights_option(parser)
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation: the config\'s tta_pipeline, else (for '
                        'classification and detection) the image and its mirror image')
    parser.add_argument('--out', metavar='FILE',
                        help='write the metrics (*.json) or the predictions (*.pkl; for '
                        'segmentation a folder of label maps)')
    parser.add_argument('--show-dir', metavar='FOLDER', help='draw the predictions there, each '
                        'picture where its image lies in the data')
    image_files.add_channels_option(parser)
    parser.add_argument('--work-dir', metavar='FOLDER',
                        help='where the log goes (default: the config\'s, else work_dirs/<name of '
                        'the config>)')
    cli.add_common_options(parser)
    args = parser.parse_args()
    image_files.check_channels_option(args)
    return args


def set_tta(cfg, task):
    """Wrap the model and replace the pipeline, with a mirrored copy where no recipe is given."""
    dataset = next(d for _, d in cli.datasets_of(cfg.test_dataloader.dataset, ''))
    if cfg.get('tta_pipeline') is None or cfg.get('tta_model') is None:
        if task is None or task.flip_tta is None:
            raise UserError('--tta: the config has no tta_pipeline and tta_model')
        print('The config has no test-time augmentation: using the image and its mirror image')
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        cfg.tta_model, pack = task.flip_tta(dataset.pipeline[-1])
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]),
                            dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    if cfg.get('data_preprocessor') is not None:
        # mmengine would give it to the wrapper, and the model would see images not normalised.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def set_show_dir(cfg, task, folder, channels):
    """Draw by our hook in place of the stock one, with its settings; leave any other."""
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    hook = cfg.default_hooks.get('visualization') or dict(type=task.stock_hook, interval=1)
    if type_name(hook) != task.stock_hook:
        hook.update(task.enable(folder))
        cfg.visualizer['save_dir'] = folder
        return
    cfg.default_hooks['visualization'] = dict(
        type='vmamba_mm.DrawHook', task=task.name, out_dir=folder, channels=channels,
        visualizer=cfg.get('visualizer'), **task.show(hook))


def set_out(cfg, task, path):
    """Refuse an unknown kind of output before the hours of evaluation."""
    if path.endswith('.json'):
        return
    is_pickle = path.endswith(('.pkl', '.pickle'))
    if task.dump is None:
        if is_pickle:
            raise UserError('--out: for segmentation give a *.json file (metrics) or a folder '
                            '(label maps)')
        evaluator = cfg.test_evaluator
        if isinstance(evaluator, list | tuple):
            evaluator = evaluator[0]
        evaluator.update(output_dir=path, keep_results=True)
    elif not is_pickle:
        raise UserError(f'--out takes a *.json (metrics) or *.pkl (predictions) file, not {path}')


def add_dump(runner, task, path):
    from mmengine.registry import METRICS

    runner.test_evaluator.metrics.append(METRICS.build(dict(type=task.dump, out_file_path=path)))


def main():
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    task = cli.find_task(cfg)
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise UserError(f'the config {args.config} has no test_dataloader and test_evaluator')
    cli.check_testing(cfg)
    cli.set_work_dir(cfg, args)
    from vmamba_mm.checkpoints.files import fetch, read_checkpoint
    from vmamba_mm.mm.loading import register
    likely = cli.families_of(cfg)
    register(args.weights, likely)
    checkpoint = str(fetch(args.checkpoint))
    read_checkpoint(checkpoint, args.weights, likely=likely)
    cli.check_data_paths(cfg, 'test_dataloader')
    cli.evaluate_in_fp32_without_gpu(cfg)
    cli.start_processes(cfg, args.launcher)
    cli.set_loader_defaults(cfg, task)
    cfg.load_from, cfg.resume = checkpoint, False
    if (task is None or task.visualizer is None) and (
            args.show_dir or args.out and not args.out.endswith('.json')):
        raise UserError('--show-dir and --out (but for *.json) are for models of '
                        f'{list_scopes()}, not for model type={cfg.model.type!r}')
    if args.out:
        set_out(cfg, task, args.out)
    if args.show_dir:
        set_show_dir(cfg, task, args.show_dir, args.channels)
    if args.tta:
        set_tta(cfg, task)
    # The averaged weights are what a checkpoint holds: EMAHook would only average them once more.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or []
                        if type_name(hook) != 'EMAHook']
    cli.add_hooks(cfg, 'CheckDataHook', 'StrictLoadHook', 'ProgressHook')
    runner = cli.build_runner(cfg)
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
    cli.run(main)
