"""Figures of predictions: a picture beside bars of classes, or beside a legend."""

import numpy as np

from vmamba_mm.mm.text import drawable

MAX_LEGEND = 20  # classes, the largest first


def class_name(meta, label):
    """The name of a class in the meta information of a data set, else its number."""
    classes = meta.get('classes') or ()
    return str(classes[label]) if label < len(classes) else f'class {label}'


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


def draw_classes(image, score, meta, out):
    """The image beside bars of the five likeliest classes.

    Args:
        image: (H, W, 3) uint8.
        score: probabilities, a tensor (classes).
        meta: of the data set, with the names.
        out: path of the picture.

    Returns:
        The classes and their probabilities in words.
    """
    score, label = score.cpu().topk(min(5, score.numel()))
    names = [class_name(meta, i) for i in label.tolist()]
    names = [n if len(n) <= 40 else n[:39] + '…' for n in names]
    shown = [drawable(name) for name in names]  # before a figure, which takes its fonts
    figure, _, bars = new_figure(image, 5)
    bars.barh(range(len(names)), score, color='#56B4E9')
    for i, (name, value) in enumerate(zip(shown, score.tolist(), strict=True)):
        bars.text(0.01, i, f'{name}  {100 * value:.1f} %', va='center')
    bars.set(xlim=(0, 1), xlabel='probability', yticks=[])
    bars.invert_yaxis()
    for side in ('top', 'right', 'left'):
        bars.spines[side].set_visible(False)
    figure.savefig(out, dpi=100)
    return ', '.join(f'{n} {100 * v:.1f} %' for n, v in zip(names, score.tolist(), strict=True))


def draw_shares(image, labels, name_of, colours, title, out):
    """The image beside the classes that are in it, the most frequent first.

    Args:
        image: (H, W, 3) uint8.
        labels: numbers of classes, of any shape.
        name_of: gives the name of a number.
        colours: of all classes, (classes, 3), from 0 to 255.
        title: of the legend.
        out: path of the picture.

    Returns:
        The classes and their shares in words.
    """
    from matplotlib.patches import Patch

    values, counts = np.unique(labels, return_counts=True)
    shares = [(int(values[i]), counts[i] / labels.size) for i in np.argsort(-counts)]
    shown = {v: drawable(name_of(v)) for v, _ in shares[:MAX_LEGEND]}
    figure, _, legend = new_figure(image, 3)
    legend.set_axis_off()
    legend.legend(handles=[Patch(color=colours[v] / 255, label=f'{shown[v]} {100 * share:.1f} %')
                           for v, share in shares[:MAX_LEGEND]],
                  loc='center left', frameon=False, title=title)
    figure.savefig(out, dpi=100)
    return ', '.join(f'{name_of(v)} {100 * share:.0f} %' for v, share in shares[:5])
