"""The tasks that the tools know: one entry for each mm* package whose models they train.

A task without a living package has a model of this one, which is the entry's key. A new task is a
new entry of :data:`TASKS` and its extra in pyproject.toml. Training, and metrics of a test, need no
entry: they work for a model of any package on mmengine.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from vmamba_mm.errors import UserError
from vmamba_mm.mm.sources import CLOUD, IMAGE, VIDEO, Source


@dataclass(frozen=True)
class Task:
    """The facts of a task that the tools have to know.

    Args:
        name: as hooks and checkpoints call it.
        extra: of this package, which installs what the task needs.
        scope: the mm* package whose registries its configs use; None for mmengine alone.
        image: height and width that published FLOPs are of; None if there is no usual size.
        visualizer: the type that draws a sample in a test; ``ascii_text`` if it has no other
            letters. None where a test draws nothing and writes metrics alone; ``draw`` to ``dump``
            are then None too.
        draw: draw(visualizer, picture, sample, path, settings) writes one picture.
        show: show(stock hook) gives the arguments of :class:`vmamba_mm.mm.hooks.DrawHook` that
            take over the settings of the package's own hook, ``stock_hook``.
        enable: enable(folder) gives the settings that make another hook draw into a folder.
        dump: the metric that writes predictions to a ``*.pkl`` file; None where they are label
            maps, which the evaluator itself writes into a folder.
        flip_tta: flip_tta(last step of the pipeline) gives the model and the last step of a
            test-time augmentation by mirror images; None where only the config can say how.
        loader: what the package's own tools add to every data loader.
        modules: what it needs besides ``scope``.
        source: the kind of files that samples are made from.
        has_score_threshold: whether ``score_thr`` decides what is drawn.
        predictor: 'module:Class' of what tools/predict.py writes files by: made of (model, config,
            meta information of the data set), and called with (file, picture, place in the run)
            it returns what it found, in words. None for what predict.py draws itself.
        takes_category: whether the predictor also takes ``category``, of the objects.
        takes_questions: whether it takes ``questions`` and a ``temperature``.
    """

    name: str
    extra: str
    scope: str | None = None
    image: tuple[int, int] | None = None
    visualizer: str | None = None
    draw: Callable[..., None] | None = None
    stock_hook: str | None = None
    show: Callable[[dict], dict] | None = None
    enable: Callable[[str], dict] | None = None
    dump: str | None = None
    flip_tta: Callable[[dict], tuple[dict, dict]] | None = None
    ascii_text: bool = False
    has_score_threshold: bool = False
    loader: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    source: Source = IMAGE
    predictor: str | None = None
    takes_category: bool = False
    takes_questions: bool = False


def task_named(name):
    """The task of a name.

    Raises:
        UserError: with the list, if there is none.
    """
    for task in TASKS.values():
        if task.name == name:
            return task
    raise UserError(f'there is no task {name!r}; known are '
                    f'{", ".join(repr(task.name) for task in TASKS.values())}')


def scopes():
    """The packages of the tasks, each once."""
    return list(dict.fromkeys(task.scope for task in TASKS.values() if task.scope))


def list_scopes():
    """The packages of the tasks in words: 'mmpretrain, mmdet and mmseg'."""
    *first, last = scopes()
    return f'{", ".join(first)} and {last}'


# --- classification -------------------------------------------------------------------------

_OF_THE_HOOK = ('type', '_scope_', 'priority', 'enable', 'draw', 'out_dir', 'test_out_dir',
                'backend_args')


def _show_classes(hook):
    settings = {k: v for k, v in hook.items() if k not in (*_OF_THE_HOOK, 'interval')}
    return dict(interval=hook.get('interval', 5000), settings=settings)


def _draw_classes(visualizer, picture, sample, path, settings):
    from vmamba_mm.mm.text import families

    visualizer.visualize_cls(picture, sample, out_file=path,
                             **{'text_cfg': dict(family=families('monospace')), **settings})


def _flip_classes(pack):
    return dict(type='AverageClsScoreTTA'), copy.deepcopy(pack)


# --- detection and segmentation -------------------------------------------------------------

def _show_samples(hook):
    arguments = dict(settings={k: hook[k] for k in ('show', 'wait_time') if k in hook})
    if 'score_thr' in hook:
        arguments['score_thr'] = hook['score_thr']
    return arguments


def _draw_sample(visualizer, picture, sample, path, settings):
    visualizer.add_datasample(path, picture, data_sample=sample.cpu(), out_file=path, **settings)


def _flip_boxes(pack):
    """Boxes have to be flipped back, for which a sample must say how it was flipped."""
    pack = copy.deepcopy(pack)
    keys = pack.get('meta_keys') or ('img_id', 'img_path', 'ori_shape', 'img_shape',
                                     'scale_factor')
    pack['meta_keys'] = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
    return dict(type='DetTTAModel', tta_cfg=dict(
        nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)), pack


# --- the table ------------------------------------------------------------------------------

_CLASSIFICATION = Task(
    name='cls', extra='cls', scope='mmpretrain', image=(224, 224),
    visualizer='mmpretrain.UniversalVisualizer', draw=_draw_classes,
    stock_hook='VisualizationHook', show=_show_classes,
    enable=lambda folder: dict(enable=True, out_dir=folder), dump='mmengine.DumpResults',
    flip_tta=_flip_classes,
    loader=dict(persistent_workers=True, collate_fn=dict(type='default_collate')))

# By the package, or by a model of this one.
TASKS = {
    'mmpretrain': _CLASSIFICATION,
    'vmamba_mm.VideoClassifier': replace(
        _CLASSIFICATION, name='video', extra='video', flip_tta=None, modules=('av',), source=VIDEO),
    'mmdet': Task(
        name='det', extra='det', scope='mmdet', image=(1280, 800),
        visualizer='mmdet.DetLocalVisualizer', draw=_draw_sample,
        stock_hook='DetVisualizationHook', show=_show_samples,
        enable=lambda folder: dict(draw=True), dump='mmdet.DumpDetResults',
        flip_tta=_flip_boxes, has_score_threshold=True),
    'mmseg': Task(
        name='seg', extra='seg', scope='mmseg', image=(512, 2048),
        visualizer='mmseg.SegLocalVisualizer', draw=_draw_sample,
        stock_hook='SegVisualizationHook', show=_show_samples,
        enable=lambda folder: dict(draw=True), ascii_text=True),
    'vmamba_mm.ImageRestorer': Task(
        name='restoration', extra='restoration', modules=('cv2',),
        predictor='vmamba_mm.mm.restoration.predict:Restorer'),
    'vmamba_mm.Cobra': Task(
        name='vlm', extra='vlm', modules=('timm',), takes_questions=True,
        predictor='vmamba_mm.mm.language.predict:Answerer'),
    'vmamba_mm.PointClassifier': Task(
        name='points', extra='points', source=CLOUD,
        predictor='vmamba_mm.mm.points.predict:Classifier'),
    'vmamba_mm.PointSegmentor': Task(
        name='parts', extra='points', source=CLOUD, takes_category=True,
        predictor='vmamba_mm.mm.points.predict:PartSegmentor'),
}
