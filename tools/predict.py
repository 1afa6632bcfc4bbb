"""Predict on images and draw the result: classes, boxes and masks, or a segmentation."""

import os
from pathlib import Path

import _cli

EXAMPLES = """\
  python tools/predict.py CONFIG CHECKPOINT photo.jpg
  python tools/predict.py CONFIG CHECKPOINT folder/ --out-dir drawn --score-thr 0.5"""

MAX_LEGEND = 20  # classes, largest area first


def parse_args():
    parser = _cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='a checkpoint file or web address, official or ours')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='image files or folders of them')
    _cli.add_weights_option(parser)
    parser.add_argument('--out-dir', default='predictions', metavar='FOLDER',
                        help='where the pictures are written (default: predictions)')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='S',
                        help='draw boxes from this score on (default: 0.3)')
    _cli.add_device_option(parser)
    _cli.add_common_options(parser, launcher=False)
    return parser.parse_args()


def find_images(names):
    """The image files named, or in the folders named; each must be readable."""
    from vmamba_mm.engine.data import is_image

    paths = _cli.list_images(names)
    for path in paths:
        if not is_image(path):
            raise _cli.UserError(f'{path} is corrupt, or no image')
    return paths


def build_model(cfg, checkpoint, name, device):
    """The config's model with all of the checkpoint's weights."""
    from vmamba_mm.engine.strict_load import check_fits

    model = _cli.build_model(cfg)
    state, _ = check_fits(model, checkpoint, name)
    model.load_state_dict(state)
    return model.to(device).eval()


def build_pipeline(cfg):
    """The test pipeline without the loading of annotations."""
    from mmengine.dataset import Compose

    dataset = next(d for _, d in _cli.datasets_of(cfg.test_dataloader.dataset, ''))

    def loads_annotations(step):
        name = getattr(step['type'], '__name__', step['type'])
        return 'Load' in name and 'Annotations' in name

    return Compose([step for step in dataset.pipeline if not loads_annotations(step)])


def find_meta(cfg, checkpoint):
    """Class names and colours: the checkpoint's, else those of the config's data set."""
    from mmengine.registry import DATASETS

    meta = (checkpoint.get('meta') or {}).get('dataset_meta')
    if not meta:
        dataset = next(d for _, d in _cli.datasets_of(cfg.test_dataloader.dataset, ''))
        kind = dataset['type']
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:  # of the default scope
                kind = registry.get(kind)
        meta = {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}
    return {key.lower(): value for key, value in meta.items()}


def class_name(meta, label):
    classes = meta.get('classes') or ()
    return str(classes[label]) if label < len(classes) else f'class {label}'


def predict(model, pipeline, path, number):
    import torch
    from mmengine.dataset import pseudo_collate

    data = pipeline(dict(img_path=str(path), img_id=number, reduce_zero_label=False,
                         seg_fields=[]))
    with torch.no_grad():
        return model.test_step(pseudo_collate([data]))[0]


# --- drawing ----------------------------------------------------------------------------------

def new_figure(image, extra):
    """A figure with the image on the left and room of ``extra`` inches on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 5.0
    width = min(max(height * image.shape[1] / image.shape[0], 2.5), 12)
    figure = Figure(figsize=(width + extra, height), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(width, extra))
    left.imshow(image)
    left.set_axis_off()
    return figure, left, right


def draw_classes(image, sample, meta, out):
    """The image beside bars of the five likeliest classes."""
    score, label = sample.pred_score.cpu().topk(min(5, sample.pred_score.numel()))
    names = [class_name(meta, i) for i in label.tolist()]
    names = [n if len(n) <= 40 else n[:39] + '…' for n in names]
    figure, _, bars = new_figure(image, 5)
    bars.barh(range(len(names)), score, color='#56B4E9')
    for i, (name, value) in enumerate(zip(names, score.tolist(), strict=True)):
        bars.text(0.01, i, f'{name}  {100 * value:.1f} %', va='center')
    bars.set(xlim=(0, 1), xlabel='probability', yticks=[])
    bars.invert_yaxis()
    for side in ('top', 'right', 'left'):
        bars.spines[side].set_visible(False)
    figure.savefig(out, dpi=100)
    return ', '.join(f'{n} {100 * v:.1f} %' for n, v in zip(names, score.tolist(), strict=True))


def draw_detections(cfg, image, sample, meta, out, score_thr):
    """mmdet's own drawing of boxes, masks and names."""
    from mmengine.registry import VISUALIZERS

    visualizer = VISUALIZERS.build(dict(type='mmdet.DetLocalVisualizer', name=f'predict {out}'))
    visualizer.dataset_meta = meta
    visualizer.add_datasample(str(out), image, sample, draw_gt=False, pred_score_thr=score_thr,
                              out_file=str(out))
    if 'pred_instances' not in sample:
        return 'drawn'
    found = sample.pred_instances.cpu()
    found = found[found.scores >= score_thr]
    text = ', '.join(f'{class_name(meta, int(i))} {100 * s:.0f} %' for i, s in
                     list(zip(found.labels, found.scores.tolist(), strict=True))[:8])
    return f'{len(found)} object(s) from score {score_thr}' + (f': {text}' if text else '')


def draw_segmentation(image, sample, meta, out):
    """The classes' colours over the image, with a legend by area."""
    import numpy as np
    from matplotlib.patches import Patch

    labels = sample.pred_sem_seg.data[0].cpu().numpy()
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts)
    palette = meta.get('palette')
    if not palette or len(palette) <= values.max():
        palette = np.random.default_rng(0).integers(0, 255, (int(values.max()) + 1, 3))
    colours = np.asarray(palette, np.float32)
    overlay = 0.45 * image + 0.55 * colours[labels]
    figure, _, legend = new_figure(overlay.astype(np.uint8), 3)
    parts = [(int(values[i]), counts[i] / labels.size) for i in order]
    legend.set_axis_off()
    legend.legend(handles=[Patch(color=colours[v] / 255, label=f'{class_name(meta, v)} '
                                 f'{100 * share:.1f} %') for v, share in parts[:MAX_LEGEND]],
                  loc='center left', frameon=False, title='share of the image')
    figure.savefig(out, dpi=100)
    return ', '.join(f'{class_name(meta, v)} {100 * share:.0f} %' for v, share in parts[:5])


def draw(cfg, path, sample, meta, out, score_thr):
    import mmcv

    image = mmcv.imread(str(path), channel_order='rgb')
    if 'pred_sem_seg' in sample:
        return draw_segmentation(image, sample, meta, out)
    if 'pred_score' in sample:
        return draw_classes(image, sample, meta, out)
    if 'pred_instances' in sample or 'pred_panoptic_seg' in sample:
        return draw_detections(cfg, image, sample, meta, out, score_thr)
    raise _cli.UserError(f'predict.py does not know how to draw {type(sample).__name__}')


def main():
    args = parse_args()
    cfg = _cli.load_config(args.config, args.cfg_options)
    if cfg.get('test_dataloader') is None:
        raise _cli.UserError(f'the config {args.config} has no test_dataloader, whose pipeline '
                             'prepares the images')
    from vmamba_mm.files import read_checkpoint

    checkpoint = read_checkpoint(args.checkpoint, args.weights)
    images = find_images(args.images)
    device = _cli.choose_device(args.device)
    model = build_model(cfg, checkpoint, args.checkpoint, device)
    pipeline = build_pipeline(cfg)
    meta = find_meta(cfg, checkpoint)
    out_dir = Path(args.out_dir)
    os.makedirs(out_dir, exist_ok=True)
    written = set()
    for number, path in enumerate(images):
        out = out_dir / f'{path.stem}.png'
        if out in written:  # the same name from two folders
            out = out_dir / f'{path.stem}_{number}.png'
        written.add(out)
        sample = predict(model, pipeline, path, number)
        result = draw(cfg, path, sample, meta, out, args.score_thr)
        print(f'[{number + 1}/{len(images)}] {path}: {result} -> {out}', flush=True)


if __name__ == '__main__':
    _cli.run(main)
