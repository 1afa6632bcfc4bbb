"""What the model found in the test images, drawn by the visualizers of mm*."""

import itertools
import os

from mmengine.hooks import Hook
from mmengine.visualization import Visualizer

from vmamba_mm.mm.hooks.data import load_image, steps_of
from vmamba_mm.mm.pictures import Pictures, reads_bgr
from vmamba_mm.mm.tasks import task_named
from vmamba_mm.mm.text import ascii_only, drawable, families
from vmamba_mm.registry import HOOKS

_numbers = itertools.count()


def build_visualizer(task, meta, cfg=None):
    """A visualizer whose fonts have the letters of the classes.

    Args:
        task: of :data:`vmamba_mm.mm.tasks.TASKS`.
        meta: of a data set, with its classes and colours.
        cfg: the config's visualizer, for its settings; its backends are left out.
    """
    from mmengine.registry import VISUALIZERS

    cfg = {k: v for k, v in (cfg or {}).items() if k not in ('name', 'vis_backends', 'save_dir')}
    if not cfg or cfg.get('type') in ('Visualizer', Visualizer):
        cfg = dict(type=task.visualizer)
    # mmengine would give an instance of the same name again.
    visualizer = VISUALIZERS.build(dict(cfg, name=f'vmamba_mm {next(_numbers)}'))
    readable = ascii_only if task.ascii_text else drawable
    classes = meta.get('classes')
    if classes:
        meta = {**meta, 'classes': tuple(readable(str(name)) for name in classes)}
    visualizer.dataset_meta = meta
    draw_texts = visualizer.draw_texts

    def draw_with_fallbacks(texts, *args, font_families='sans-serif', **kwargs):
        count = 1 if isinstance(texts, str) else len(texts)
        return draw_texts(texts, *args, font_families=[families(font_families)] * count, **kwargs)

    visualizer.draw_texts = draw_with_fallbacks
    return visualizer


@HOOKS.register_module()
class DrawHook(Hook):
    """Draw test images with what the model found, in place of the visualization hooks of mm*.

    Those decode each file by OpenCV, which knows no more than four channels, and call pictures
    alike whose images have the same name. Here the data set's own loader reads them, and a
    picture lies below ``out_dir`` where its image lies below the data's root.

    Args:
        task: its name: 'cls', 'det', 'seg', 'video' (:data:`vmamba_mm.mm.tasks.TASKS`).
        out_dir: the folder of the pictures.
        visualizer: the config's, or None for that of the task.
        score_thr: detections are drawn from this score on.
        interval: one image of so many is drawn.
        channels: of an image to be drawn, one or three; None as of
            :func:`vmamba_mm.mm.pictures.default_channels`.
        settings: further arguments of the visualizer's method for a sample.
    """

    priority = 'LOW'

    def __init__(self, task, out_dir, visualizer=None, score_thr=0.3, interval=1, channels=None,
                 settings=None):
        self.task, self.out_dir = task_named(task), out_dir
        self.cfg, self.interval = visualizer, interval
        self.channels, self.settings = channels, dict(settings or {})
        if self.task.has_score_threshold:
            self.settings['pred_score_thr'] = score_thr

    def before_test(self, runner):
        dataset = runner.test_dataloader.dataset
        self.root = os.path.abspath(getattr(dataset, 'data_root', None) or '')
        self.steps = steps_of(dataset)
        model = getattr(runner.model, 'module', runner.model)
        self.to_picture = Pictures(
            self.channels, reads_bgr(self.steps, getattr(model, 'data_preprocessor', None)),
            runner.logger.info)
        self.visualizer = build_visualizer(self.task, dataset.metainfo, self.cfg)
        self.count = 0

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=()):
        for number, sample in enumerate(outputs):
            if self.count % self.interval == 0:
                self.draw(sample, data_batch, number)
            self.count += 1

    def draw(self, sample, data_batch, number):
        source = self.task.source
        path = sample.get(source.path_key)
        if path:
            image, out = load_image(self.steps, path, source), self.name(path)
        else:  # as the model gets it, for images that are no files
            image = data_batch['inputs'][number].permute(1, 2, 0).cpu().numpy()
            out = os.path.join(self.out_dir, f'{self.count}.png')
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        self.task.draw(self.visualizer, self.to_picture(image), sample, out, self.settings)

    def name(self, path):
        below = os.path.relpath(os.path.abspath(path), self.root)
        if below.startswith(os.pardir):
            below = os.path.splitdrive(os.path.abspath(path))[1].lstrip('/\\')
        # With its own ending, so that a.jpg and a.tiff have different ones.
        return os.path.join(self.out_dir, f'{below}.png')
