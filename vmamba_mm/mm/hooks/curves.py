"""curves.png: the loss and every validation metric of a run, over all its restarts."""

import json
import math
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from vmamba_mm.mm.text import drawable
from vmamba_mm.registry import HOOKS

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'os^Dv*X'
MAX_PER_PANEL = len(COLOURS)
BOOKKEEPING = {'lr', 'base_lr', 'data_time', 'time', 'epoch', 'iter', 'step', 'memory', 'grad_norm',
               'momentum'}


def read_scalars(work_dir):
    """(training records, validation records) of a work dir, in order of steps.

    Each start of the run writes its own file. Where a resumed run repeats steps after its
    checkpoint, its records replace the older ones.
    """
    train, val = [], []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        new_train, new_val = [], []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            if 'step' in record:
                (new_train if 'iter' in record else new_val).append(record)
        for records, new in ((train, new_train), (val, new_val)):
            if new:
                first = min(r['step'] for r in new)
                records[:] = [r for r in records if r['step'] < first] + new
    return train, val


def series(records, skip=BOOKKEEPING):
    """name -> (steps, values) of the finite numbers in some records."""
    result = {}
    for record in records:
        for name, value in record.items():
            if (name not in skip and not name.endswith('/lr') and not isinstance(value, bool)
                    and isinstance(value, int | float) and math.isfinite(value)):
                steps, values = result.setdefault(name, ([], []))
                steps.append(record['step'])
                values.append(value)
    return result


def group_metrics(metrics):
    """Panels of metrics: those of one kind and of a like size share one.

    A metric that is never defined (COCO writes -1) is left out.
    """
    panels = {}
    for name, (steps, values) in metrics.items():
        if all(v == -1 for v in values):
            continue
        prefix, _, leaf = name.rpartition('/')
        kind = leaf.partition('_')[0]
        prefix = f'{prefix} {kind}'.strip() if kind in ('bbox', 'segm') else prefix or 'metrics'
        size = 'percent' if max(abs(v) for v in values) > 1.5 else 'fraction'
        panels.setdefault((prefix, size), {})[name] = (steps, values)
    split = []
    for (prefix, _), members in panels.items():
        names = list(members)
        for i in range(0, len(names), MAX_PER_PANEL):
            split.append((prefix, {n: members[n] for n in names[i:i + MAX_PER_PANEL]}))
    return split


def plot_curves(work_dir, by_epoch=None):
    """Draw ``curves.png`` in a work dir; returns its path, or None if nothing was logged."""
    train, val = read_scalars(work_dir)
    losses = {n: v for n, v in series(train).items() if n == 'loss' or 'loss' in n.split('.')[-1]}
    panels = group_metrics(series(val))
    if not losses and not panels:
        return None
    losses = {drawable(name): values for name, values in losses.items()}
    panels = [(drawable(prefix), {drawable(name.rpartition('/')[2]): values for name, values in
                                  members.items()}) for prefix, members in panels]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = bool(losses) + len(panels)
    columns = min(n, 2)
    rows = -(-n // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[n:]:
        unused.set_axis_off()
    if losses:
        ax = axes.pop(0)
        _plot_losses(ax, losses)
    if by_epoch is None:
        by_epoch = bool(val) and bool(train) and val[-1]['step'] < train[-1]['step']
    for ax, (prefix, members) in zip(axes, panels, strict=False):
        for i, (name, (steps, values)) in enumerate(members.items()):
            ax.plot(steps, values, color=COLOURS[i], marker=MARKERS[i], markersize=5,
                    label=name)
        ax.set(title=f'validation: {prefix}', xlabel='epoch' if by_epoch else 'iteration')
        _finish(ax)
        if len(members) == 1:
            steps, values = next(iter(members.values()))
            ax.annotate(f'{values[-1]:.4g}', (steps[-1], values[-1]), xytext=(-4, 8),
                        textcoords='offset points', ha='right')
    path = Path(work_dir) / 'curves.png'
    figure.savefig(path, dpi=110)
    return path


def _plot_losses(ax, losses):
    # The total last, so that it lies on top of its parts.
    names = [name for name in losses if name != 'loss'][:MAX_PER_PANEL - 1]
    for i, name in enumerate(names, 1):
        ax.plot(*losses[name], color=COLOURS[i], linewidth=1, label=name)
    if 'loss' in losses:
        ax.plot(*losses['loss'], color=COLOURS[0], linewidth=2, label='loss')
    values = [v for _, vs in losses.values() for v in vs]
    if min(values) > 0 and max(values) > 100 * min(values):
        ax.set_yscale('log')
    ax.set(title='training loss', xlabel='iteration', ylabel='loss')
    _finish(ax)


def _finish(ax):
    ax.grid(alpha=0.3)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize='small')


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draw the curves after each validation and at the end of the training."""

    priority = 'LOWEST'

    def _plot(self, runner):
        if not is_main_process():
            return None
        logger_hook = next((h for h in runner.hooks if hasattr(h, 'log_metric_by_epoch')), None)
        try:
            return plot_curves(runner.work_dir, getattr(logger_hook, 'log_metric_by_epoch', None))
        except Exception as err:  # a picture must not end a training
            runner.logger.warning(f'curves.png could not be drawn: {err!r}')
            return None

    def after_val_epoch(self, runner, metrics=None):
        if runner._train_loop is not None and not isinstance(runner._train_loop, dict):
            self._plot(runner)

    def after_train(self, runner):
        path = self._plot(runner)
        if path:
            runner.logger.info(f'Curves: {path}')
