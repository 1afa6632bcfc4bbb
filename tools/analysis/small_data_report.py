"""Table, picture and Markdown of tools/analysis/small_data.py, from its rows and its setting.

A row is one epoch of one model with one seed. What counts is the last epoch of each.
"""

import itertools
import json
import math
import statistics
from pathlib import Path

from curve_labels import spread
from report_parts import (
    bullets,
    command_block,
    markdown_table,
    optional,
    print_table,
    read_results,
    wrapped,
    write_csv,
)

COLUMNS = dict(model=str, seed=int, epoch=int, loss=float, top1=float,
               top1_no_scan=optional(float), images_per_s=float)

LIMITS = (
    'A tiny set, seen from scratch by small models: what helps here need not help on ImageNet, '
    'which has 1.28 million training images, nor in the published sizes.',
    'One budget of epochs and one recipe for all, tuned for none of them. With more epochs, or a '
    'recipe of its own, each model may do better, and the order may change.',
    'Equal parameters are not equal FLOPs, nor equal time; both are in the table.',
    'Speed is that of whole training steps here, with cropping and optimiser, on small maps: not '
    "the models' best.",
)

#: What models are whose mlp_ratio is set.
OTHERS = {
    'vmamba-ssd': 'VMamba with SSD in place of S6, `tiny_m2` with a state of {d_state}{plain}',
    'vssd': "VSSD's `tiny` with heads (3, 6, 12, 24) and a state of {d_state}",
    'swin': "timm's Swin with heads (3, 6, 12, 24) and windows of {window}"}


# --- files ----------------------------------------------------------------------------------

def write(rows, setting, folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, COLUMNS, folder / 'small_data.csv')
    (folder / 'small_data.json').write_text(json.dumps(
        dict(setting=setting, summary=summarise(rows, setting)), indent=2) + '\n')


def read(folder):
    """The rows and the setting that :func:`write` left.

    Raises:
        UserError: if they are not there, or not of this tool.
    """
    return read_results(folder, 'small_data', COLUMNS)


# --- numbers --------------------------------------------------------------------------------

def summarise(rows, setting):
    """Model -> the accuracies (%) of the last epoch for each seed, and what they amount to.

    ``std`` is that of a sample (n - 1), None for one seed; ``no_scan`` is the mean without the
    scan, None for a model that has none; ``images_per_s`` is the median of all
    epochs, so that the first, which compiles, does not count.
    """
    summary = {}
    for name, model in setting['models'].items():
        model_rows = [row for row in rows if row['model'] == name]
        last = max(row['epoch'] for row in model_rows)
        top1 = [row['top1'] for row in model_rows if row['epoch'] == last]
        no_scan = [row['top1_no_scan'] for row in model_rows if row['top1_no_scan'] is not None]
        summary[name] = dict(
            model, top1=top1, mean=statistics.fmean(top1), min=min(top1), max=max(top1),
            std=statistics.stdev(top1) if len(top1) > 1 else None,
            no_scan=statistics.fmean(no_scan) if no_scan else None,
            images_per_s=statistics.median(row['images_per_s'] for row in model_rows))
    return summary


def compare(summary):
    """(better, worse, difference of means, parted) of all pairs, the largest difference first.

    Parted: every seed of the one is above every seed of the other.
    """
    pairs = []
    for pair in itertools.combinations(summary, 2):
        worse, better = sorted(pair, key=lambda name: summary[name]['mean'])
        pairs.append((better, worse, summary[better]['mean'] - summary[worse]['mean'],
                      summary[better]['min'] > summary[worse]['max']))
    return sorted(pairs, key=lambda pair: -pair[2])


def findings(summary, setting):
    """The sentences that the numbers allow."""
    seeds, pairs = len(setting['seeds']), compare(summary)
    mean = statistics.fmean(model['mean'] for model in summary.values())
    images = setting['val_images']
    error = 100 * math.sqrt(mean / 100 * (1 - mean / 100) / images)
    lines = [f'The largest class of val is {setting["chance"]:.1f} % of it; the models reach '
             f'{min(m["mean"] for m in summary.values()):.1f} to '
             f'{max(m["mean"] for m in summary.values()):.1f} % on average.']
    if seeds == 1:
        lines.append('One seed: the spread is not known, so no difference between models is '
                     'claimed.')
    elif pairs:
        parted = [f'{a} over {b} (+{d:.1f})' for a, b, d, apart in pairs if apart]
        within = [f'{a} and {b} ({d:.1f})' for a, b, d, apart in pairs if not apart]
        if parted:
            lines.append('Every seed of the first above every seed of the second, with the '
                         'difference of the means in points: ' + ', '.join(parted) + '.')
        if within:
            lines.append('Within the spread of the seeds, so not told apart (difference of the '
                         'means in points): '
                         + ', '.join(within) + '.')
        chance = 2 / math.comb(2 * seeds, seeds)
        number = '1 pair was' if len(pairs) == 1 else f'{len(pairs)} pairs were'
        lines.append(f'{seeds} seeds are few: two models that are equally good would be parted '
                     f'like that in {100 * chance:.2g} % of all studies, and {number} compared '
                     'here.')
    falls = {n: m['mean'] - m['no_scan'] for n, m in summary.items() if m['no_scan'] is not None}
    if falls:
        lines.append('Without scan: the trained weights with x_proj at zero, which leaves SS2D its '
                     'skip D x, so that only convolutions see neighbours. The mean changes by '
                     + ', '.join(f'{-d:+.1f} ({n})' for n, d in falls.items()) + ' points.'
                     + (' That is less than the standard error below: the scans hardly take part '
                        'in what these models decide, so their accuracies say little about '
                        'which scan is best.' if max(map(abs, falls.values())) < error else ''))
    lines.append(f'Val has {images} images: one is {100 / images:.2f} points, and another draw of '
                 f'as many would move an accuracy of {mean:.0f} % by {error:.1f} points (one '
                 'standard error), which the spread of the seeds does not contain.')
    return lines


def table(summary):
    """Rows of text, the first of them the titles."""
    lines = [('model', 'parameters', 'MFLOPs', 'top-1, mean', 'std', 'min to max',
              'mean without scan', 'training, images/s')]
    for name, m in summary.items():
        lines.append((name, f'{m["parameters"]:,}', f'{m["flops"] / 1e6:,.1f}',
                      f'{m["mean"]:.1f}', '-' if m['std'] is None else f'{m["std"]:.1f}',
                      f'{m["min"]:.1f} to {m["max"]:.1f}',
                      '-' if m['no_scan'] is None else f'{m["no_scan"]:.1f}',
                      f'{m["images_per_s"]:,.0f}'))
    return lines


def show(summary):
    print_table(table(summary))


# --- picture --------------------------------------------------------------------------------

def draw(rows, summary, setting, path):
    """Left the accuracy over epochs, mean and range of the seeds; right each seed at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vmamba_mm.mm.hooks.curves import COLOURS, MARKERS
    from vmamba_mm.mm.text import drawable

    colours = dict(zip(summary, itertools.cycle(COLOURS), strict=False))
    markers = dict(zip(summary, itertools.cycle(MARKERS), strict=False))
    figure = Figure(figsize=(12, 5), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ends = {}
    for name, colour in colours.items():
        by_epoch = {}
        for row in rows:
            if row['model'] == name:
                by_epoch.setdefault(row['epoch'], []).append(row['top1'])
        epochs = sorted(by_epoch)
        means = [statistics.fmean(by_epoch[e]) for e in epochs]
        left.fill_between(epochs, [min(by_epoch[e]) for e in epochs],
                          [max(by_epoch[e]) for e in epochs], color=colour, alpha=0.12, linewidth=0)
        left.plot(epochs, means, color=colour, linewidth=1.8)
        left.plot(epochs[-1], means[-1], color=colour, marker=markers[name], markersize=6,
                  clip_on=False)
        ends[name] = means[-1]
    last = max(row['epoch'] for row in rows)
    accuracies = [row['top1'] for row in rows] + [setting['chance']]
    low, high = min(accuracies), max(accuracies)
    low, high = low - 0.05 * (high - low) - 1, high + 0.05 * (high - low) + 1
    heights = spread(list(ends.values()), 0.055 * (high - low))
    for (name, mean), height in zip(ends.items(), heights, strict=True):
        left.annotate(name, (last, mean), xytext=(1.05, height),
                      textcoords=left.get_yaxis_transform(), color=colours[name], va='center',
                      arrowprops=dict(arrowstyle='-', color=colours[name], linewidth=0.7,
                                      relpos=(0, 0.5), shrinkA=1, shrinkB=4))
    left.axhline(setting['chance'], color='#777777', linewidth=1, linestyle=':')
    left.text(last, setting['chance'], 'chance', color='#777777', ha='right', va='bottom')
    left.set(xlabel='epoch', ylabel='top-1 on val, %', xlim=(1, max(last, 2)),
             ylim=(low, max(high, max(heights))), title='mean of the seeds, and their range')
    left.xaxis.get_major_locator().set_params(integer=True)
    for y, (name, model) in enumerate(summary.items()):
        right.plot([model['min'], model['max']], [y, y], color=colours[name], linewidth=1.2)
        right.plot(model['top1'], [y] * len(model['top1']), color=colours[name], linestyle='',
                   marker=markers[name], markersize=8, alpha=0.75)
        right.plot(model['mean'], y, color='black', marker='|', markersize=22, linestyle='')
        right.annotate(f'{model["mean"]:.1f}', (model['mean'], y), xytext=(0, 14),
                       textcoords='offset points', ha='center')
    right.set_yticks(range(len(summary)), list(summary))
    for label, colour in zip(right.get_yticklabels(), colours.values(), strict=True):
        label.set_color(colour)
    right.set(xlabel='top-1 on val, %', ylim=(len(summary) - 0.5, -0.6),
              title=f'epoch {last}: seeds, and their mean')
    right.margins(x=0.12)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
    count = len(setting['seeds'])
    figure.suptitle(f'{drawable(setting["data"])}: {setting["train_images"]} training images, '
                    f'{len(setting["classes"])} classes, {setting["size"]}x{setting["size"]}, '
                    f'{count} seed{"s" if count > 1 else ""}', fontsize=11)
    figure.savefig(path, dpi=130)


# --- Markdown -------------------------------------------------------------------------------

def models_of(summary, setting):
    """What the models are."""
    plain = '' if setting['conv_kernel'] else ' without depthwise convolutions'
    lines = []
    if any(name not in OTHERS for name in summary):
        lines.append(f'`vmamba-*` {"but `vmamba-ssd` " if "vmamba-ssd" in summary else ""}are '
                     f'`tiny_s1l8`{plain}; with one seed their weights at the start are the same')
    for name in summary:
        if name in OTHERS:
            what = OTHERS[name].format(**setting, plain=plain)
            lines.append(f'`{name}` is {what}, with mlp_ratio {summary[name]["mlp_ratio"]:g} for '
                         'equal parameters')
    return (f'Models, all at embed_dims {setting["embed_dims"]} and depths '
            f'{tuple(setting["depths"])}: {"; ".join(lines)}')


def markdown(summary, setting, picture):
    """The report; ``picture`` is its name relative to the report."""
    s, recipe = setting, setting['recipe']
    low, high = recipe['crop_area']
    setting_lines = [
        f'{models_of(summary, s)}.',
        f'Data: decoded once and kept at {round(s["size"] * 8 / 7)} pixels; random crops of '
        f'{low:.0%} to {high:.0%} of the area, resized to {s["size"]}x{s["size"]}; flips; '
        f'brightness, contrast and saturation within {recipe["colour"]:.0%}; the centre for val.',
        f'Training: {s["epochs"]} epochs, {s["steps"]} steps of {s["batch_size"]} images; AdamW, '
        f'highest learning rate {s["lr"]:g}, warm-up in {recipe["warm_up"]:.0%} of the steps, '
        f'cosine to {recipe["final_lr"]:.0%} of it, weight decay {recipe["weight_decay"]:g}, '
        f'gradient norm at most {recipe["max_norm"]:g}, label smoothing '
        f'{recipe["label_smoothing"]:g}, stochastic depth {recipe["drop_path_rate"]:g}; no EMA.',
        f'Seeds: {", ".join(map(str, s["seeds"]))}. Each decides initialisation, order and '
        'augmentation, alike for all models.',
        f'{s["device"]}, {s["dtype"]}{" autocast" if s["dtype"] == "fp16" else ""}'
        f'{", CUDA graphs" if s["cuda_graphs"] else ""}; torch {s["torch"]}, timm {s["timm"]}, '
        f'vmamba_mm {s["vmamba_mm"]}, Python {s["python"]}; {s["seconds"]:.0f} s in all.']
    intro = (f'{", ".join(f"`{name}`" for name in summary)}, of equal parameters, trained from '
             f'scratch on `{s["data"]}`: {s["train_images"]:,} training and {s["val_images"]:,} '
             f'validation images of {len(s["classes"])} classes ({", ".join(s["classes"])}). '
             f'Top-1 is in %, on val, at the last epoch, over {len(s["seeds"])} seed(s). FLOPs are '
             'of one image; a multiply-add is 1.')
    return f"""\
# Small-data study

{wrapped(intro)}

{markdown_table(table(summary))}

![Accuracy over epochs, and of each seed at the end]({picture})

Measured with this command, where `--data` takes the place of the folder:

{command_block(s['command'])}

## What this shows and what it does not

{bullets(findings(summary, s))}
{bullets(LIMITS)}

## Setting

{bullets(setting_lines)}
"""


def write_report(rows, summary, setting, path):
    """The Markdown, and the picture under the same name beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix('.png')
    draw(rows, summary, setting, picture)
    path.write_text(markdown(summary, setting, picture.name))
