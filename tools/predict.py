"""Predict on images and draw the result: classes, boxes and masks, or a segmentation.

Of a model of videos, the files are videos, and the picture shows frames and classes. Of a model
that finds changes, --after names the later images, and the picture shows both and what changed. Of
a model that restores images, the restored image is written, with the bits and the alpha of the
file. Of a model of clouds of points, the files are clouds; where it finds parts of objects,
--category names the kind of object, and a PLY file with the part of each point is written beside
the picture. Of a model that talks about images, --ask puts questions, and the answers are printed
as they come. A file that cannot be predicted is reported and passed over; the exit code is then 1.
"""

import functools
import importlib
import sys
from pathlib import Path

from vmamba_mm.config import scopes_of, type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, figures
from vmamba_mm.mm.cli import images as image_files
from vmamba_mm.mm.figures import class_name
from vmamba_mm.mm.inputs import build_steps, build_trained, load_second, loads_pairs
from vmamba_mm.mm.sources import IMAGE, SECOND_KEY
from vmamba_mm.mm.tasks import task_named

EXAMPLES = """\
  python tools/predict.py CONFIG CHECKPOINT photo.jpg
  python tools/predict.py CONFIG CHECKPOINT folder/ --out-dir drawn --score-thr 0.5
  python tools/predict.py CONFIG CHECKPOINT six_channels.tiff --channels 3 2 1
  python tools/predict.py CONFIG CHECKPOINT clip.mp4   (a config of videos)
  python tools/predict.py CONFIG CHECKPOINT A/ --after B/   (a config of changes)
  python tools/predict.py CONFIG CHECKPOINT chair.txt --category Chair   (of parts of objects)
  python tools/predict.py CONFIG CHECKPOINT photo.jpg --ask 'What is this?' 'Where is it?'
  python tools/predict.py CONFIG CHECKPOINT small.png --cfg-options model.test_cfg.tile=400"""

CHANGED = (213, 94, 0)  # the colour of what changed


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='a checkpoint file or web address, official or ours')
    parser.add_argument('images', metavar='IMAGE', nargs='+',
                        help='image files (of a config of videos or clouds, their files) or '
                        'folders of them')
    parser.add_argument('--after', metavar='IMAGE', nargs='+',
                        help='of a config that finds changes: the later image of each, in the same '
                        'order, or a folder with images of the same names')
    parser.add_argument('--category', metavar='NAME',
                        help='of a config that finds parts of objects: what the objects are')
    parser.add_argument('--ask', metavar='QUESTION', nargs='+',
                        help='of a config that talks about images: questions, one after the other')
    parser.add_argument('--temperature', type=float, metavar='T',
                        help='with --ask: draw each token among the likely ones, the more freely '
                        'the higher (default: the config\'s, 0 for the likeliest)')
    cli.add_weights_option(parser)
    parser.add_argument('--out-dir', default='predictions', metavar='FOLDER',
                        help='where the pictures are written (default: predictions); a number is '
                        'added to a name that is taken, and no image is overwritten')
    image_files.add_channels_option(parser)
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='S',
                        help='draw boxes from this score on (default: 0.3)')
    cli.add_device_option(parser)
    cli.add_common_options(parser, launcher=False)
    args = parser.parse_args()
    image_files.check_channels_option(args)
    return args


def find_meta(cfg, checkpoint):
    """Class names and colours: the checkpoint's, else those of the config's data set."""
    from mmengine.registry import DATASETS

    meta = (checkpoint.get('meta') or {}).get('dataset_meta')
    if not meta:
        dataset = next(d for _, d in cli.datasets_of(cfg.test_dataloader.dataset, ''))
        kind = dataset['type']
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:  # of the default scope
                kind = registry.get(kind)
        meta = {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}
    return {key.lower(): value for key, value in meta.items()}


def predict(model, steps, path, number, source, after=None):
    """Run the model on a file: its result, and the image as it was loaded; of a video its frames.

    Args:
        source: the kind of file, of :mod:`vmamba_mm.mm.sources`.
        after: the later image of a pair.
    """
    import torch
    from mmengine.dataset import pseudo_collate

    from vmamba_mm.mm.hooks.data import apply_steps

    pair = {} if after is None else {SECOND_KEY: str(after)}
    data, loaded = apply_steps(steps, {source.path_key: str(path), 'img_id': number,
                                       'seg_fields': [], 'reduce_zero_label': False, **pair})
    if loaded is None or data is None:
        raise UserError(f'the test pipeline makes nothing of {path}: it needs a step that '
                        f'loads the file, such as {source.loader}')
    try:
        with torch.no_grad():
            return model.test_step(pseudo_collate([data]))[0], source.picture(loaded)
    except Exception as err:
        message = cli.explain(err) or f'{type(err).__name__}: {err}'
        raise UserError(f'the model fails on {path}, {source.size(loaded)}: {message}'
                        ) from err


# --- drawing ----------------------------------------------------------------------------------

class Detections:
    """mmdet's own drawing of boxes, masks and names."""

    def __init__(self, meta, score_thr):
        self.meta, self.score_thr = meta, score_thr

    @functools.cached_property
    def visualizer(self):
        from vmamba_mm.mm.hooks.draw import build_visualizer

        return build_visualizer(task_named('det'), self.meta)

    def draw(self, image, sample, out):
        self.visualizer.add_datasample(str(out), image, sample, draw_gt=False, out_file=str(out),
                                       pred_score_thr=self.score_thr)
        if 'pred_instances' not in sample:
            return 'drawn'
        objects = sample.pred_instances.cpu()
        objects = objects[objects.scores >= self.score_thr]
        text = ', '.join(f'{class_name(self.meta, int(i))} {100 * s:.0f} %' for i, s in
                         list(zip(objects.labels, objects.scores.tolist(), strict=True))[:8])
        return (f'{len(objects)} object(s) from score {self.score_thr}'
                + (f': {text}' if text else ''))


def draw_segmentation(image, sample, meta, out):
    """The classes' colours over the image, with a legend by area."""
    import numpy as np

    labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(int)  # of one logit they are floats
    palette = meta.get('palette')
    if not palette or len(palette) <= labels.max():
        palette = np.random.default_rng(0).integers(0, 255, (int(labels.max()) + 1, 3))
    colours = np.asarray(palette, np.float32)
    overlay = (0.45 * image + 0.55 * colours[labels]).astype(np.uint8)
    return figures.draw_shares(overlay, labels, lambda label: class_name(meta, label), colours,
                               'share of the image', out)


def draw_change(before, after, sample, meta, out):
    """The two images, and the later one with what changed in colour."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    changed = sample.pred_sem_seg.data[0].cpu().numpy().astype(bool)
    marked = after.astype(np.float32)
    marked[changed] = 0.35 * marked[changed] + 0.65 * np.float32(CHANGED)
    share = f'{100 * changed.mean():.1f} %'
    height, width = after.shape[:2]
    side = min(max(4.0 * width / height, 2.5), 8)
    figure = Figure(figsize=(3 * side, 4.4), layout='constrained')
    FigureCanvasAgg(figure)
    shown = (('before', before), ('after', after),
             (f'{class_name(meta, 1)}: {share}', marked.astype(np.uint8)))
    for axes, (title, image) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(image)
        axes.set(title=title)
        axes.set_axis_off()
    figure.savefig(out, dpi=100)
    return f'{class_name(meta, 1)} {share}'


def draw(image, sample, meta, out, detections):
    if 'pred_sem_seg' in sample:
        return draw_segmentation(image, sample, meta, out)
    if 'pred_score' in sample:
        return figures.draw_classes(image, sample.pred_score, meta, out)
    if 'pred_instances' in sample or 'pred_panoptic_seg' in sample:
        return detections.draw(image, sample, out)
    raise UserError(f'predict.py does not know how to draw {type(sample).__name__}')


def write_all(predictor, images, out_dir, source):
    """Let a task's own predictor write what it makes of each file."""
    outputs = image_files.Outputs(out_dir, predictor.suffixes)
    failures = image_files.Failures(len(images), predictor.done, source)
    for number, path in enumerate(images):
        place = f'[{number + 1}/{len(images)}] {path}:'
        try:
            out = outputs.choose(path)
            result = predictor(path, out, place)
        except Exception as err:
            failures.add(path, err)
            continue
        print(f'{place} {result} -> {out}', flush=True)
    failures.finish()


def make_predictor(task, model, cfg, meta, args):
    module, _, name = task.predictor.partition(':')
    more = dict(category=args.category) if task.takes_category else {}
    if task.takes_questions:
        more = dict(questions=args.ask, temperature=args.temperature)
    return getattr(importlib.import_module(module), name)(model, cfg, meta, **more)


def find_later(images, names, takes_pairs):
    """The later image of each one, of the names of --after; None for each without pairs."""
    if not takes_pairs:
        if names:
            raise UserError('--after is for a config that finds changes between two images, and '
                            'this one takes them one by one: leave it out')
        return [None] * len(images)
    if not names:
        raise UserError('the config finds changes between two images: name the later ones after '
                        '--after, as in predict.py CONFIG CHECKPOINT before.png --after after.png')
    if len(names) == 1 and Path(names[0]).is_dir():
        later = [Path(names[0]) / path.name for path in images]
        absent = [path for path in later if not path.is_file()]
        if absent:
            missing = cli.shorten([path.name for path in absent])
            raise UserError(f'the folder {names[0]} has no {missing}; the later images are called '
                            'as the earlier ones')
        return later
    later = image_files.list_images(names)
    if len(later) != len(images):
        raise UserError(f'{len(images)} image(s) and {len(later)} after --after: give one for each')
    return later


def find_images(names, out_dir, source):
    """The files named, but for pictures that this tool drew there before."""
    images = image_files.list_images(names, source)
    drawn = [p for p in images if p.suffix.lower() == '.png' and p.parent.resolve() ==
             out_dir.resolve() and image_files.made_from(p)]
    if drawn:
        print(f'skipped {len(drawn)} picture(s) that predict.py drew: {cli.shorten(drawn)}',
              file=sys.stderr)
        images = [p for p in images if p not in drawn]
    if not images:
        raise UserError(f'{", ".join(names)}: only pictures that predict.py drew')
    return images


def main():
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    if cfg.get('test_dataloader') is None:
        raise UserError(f'the config {args.config} has no test_dataloader, whose pipeline '
                        'prepares the images')
    from vmamba_mm.checkpoints.files import read_checkpoint

    out_dir = Path(args.out_dir)
    checkpoint = read_checkpoint(args.checkpoint, args.weights, likely=cli.families_of(cfg))
    task = cli.find_task(cfg)
    if task is None and next(scopes_of(cfg.model.type), None) == 'vmamba_mm':
        raise UserError(f'predict.py makes nothing of files by a {type_name(cfg.model)}: load it '
                        'in Python, as its page in docs/ shows')
    source = IMAGE if task is None else task.source
    if args.category and not (task and task.takes_category):
        raise UserError('--category is for a config that finds parts of objects: leave it out')
    if (args.ask or args.temperature is not None) and not (task and task.takes_questions):
        raise UserError('--ask and --temperature are for a config that talks about images: leave '
                        'them out')
    if task and task.takes_questions and not args.ask:
        raise UserError("the config talks about images: ask something, as in predict.py CONFIG "
                        "CHECKPOINT photo.jpg --ask 'What is this?'")
    if args.channels and task and task.predictor:
        raise UserError('--channels chooses what pictures of images with more channels show, and '
                        'this config draws others: leave it out')
    images = find_images(args.images, out_dir, source)
    later = find_later(images, args.after, loads_pairs(cfg))
    device = cli.choose_device(args.device)
    model = build_trained(cfg, checkpoint, args.checkpoint, device)
    meta = find_meta(cfg, checkpoint)
    if task is not None and task.predictor:
        write_all(make_predictor(task, model, cfg, meta, args), images, out_dir, source)
        return
    from vmamba_mm.mm.pictures import Pictures, reads_bgr

    steps = build_steps(cfg)
    outputs = image_files.Outputs(out_dir)
    failures = image_files.Failures(len(images), 'predicted', source)
    detections = Detections(meta, args.score_thr)
    to_picture = Pictures(args.channels,
                          reads_bgr(steps, getattr(model, 'data_preprocessor', None)))
    for number, path in enumerate(images):
        try:
            sample, image = predict(model, steps, path, number, source, later[number])
            picture = to_picture(image)
            out = outputs.choose(path)
            if later[number] is None:
                result = draw(picture, sample, meta, out, detections)
            else:
                after = to_picture(load_second(steps, path, later[number]))
                result = draw_change(picture, after, sample, meta, out)
            image_files.sign(out, path)
        except Exception as err:
            failures.add(path, err)
            continue
        print(f'[{number + 1}/{len(images)}] {path}: {result} -> {out}', flush=True)
    failures.finish()


if __name__ == '__main__':
    cli.run(main)
