"""What resolution.py found, as a table, as files and as pictures; the fits of the FLOPs."""

import json

import numpy as np
from curve_labels import label_ends
from report_parts import finish, make_figure, number, plain_ticks, style_of, write_csv

COLUMNS = ('model', 'resolution', 'batch', 'parameters', 'flops', 'ms', 'images_per_s', 'peak_mib',
           'mib_per_image', 'accuracy', 'images', 'problem')
FEWEST = 3  # sizes that a fit needs: two are always on a line


# --- the fits ---------------------------------------------------------------------------------

def fit_growth(sizes, flops):
    """Fit how FLOPs grow with the number of pixels, by least squares.

    Args:
        sizes: sides of square images, in pixels.
        flops: of one image of each.

    Returns:
        None for fewer than three sizes, else a dict: the line's 'slope' (FLOPs per pixel),
        'intercept' (FLOPs), 'r2' and 'worst' (largest distance from the line / largest FLOPs),
        and of the power law FLOPs = 'factor' * pixels ** 'exponent', fitted to the logarithms.
    """
    if len(sizes) < FEWEST:
        return None
    pixels, flops = np.square(np.asarray(sizes, float)), np.asarray(flops, float)
    slope, intercept = np.polyfit(pixels, flops, 1)
    off = flops - (slope * pixels + intercept)
    exponent, factor = np.polyfit(np.log(pixels), np.log(flops), 1)
    fit = dict(slope=slope, intercept=intercept,
               r2=1 - np.square(off).sum() / np.square(flops - flops.mean()).sum(),
               worst=np.abs(off).max() / flops.max(), exponent=exponent, factor=np.exp(factor))
    return {name: float(value) for name, value in fit.items()}


def fits_of(rows):
    """{model: fit_growth}."""
    return {name: fit_growth([r['resolution'] for r in of_model], [r['flops'] for r in of_model])
            for name, of_model in by_model(rows).items()}


def by_model(rows):
    rows_of = {}
    for row in rows:
        rows_of.setdefault(row['model'], []).append(row)
    return rows_of


# --- text and files ---------------------------------------------------------------------------

def describe(row):
    text = f'{row["model"]} at {row["resolution"]}x{row["resolution"]}: '
    if row['problem']:
        text += f'{row["problem"]}; '
    text += f'{number(row["flops"] / 1e9)} GFLOPs'
    if row['images_per_s'] is not None:
        text += f', {number(row["images_per_s"])} images/s in batches of {row["batch"]}'
    if row['peak_mib'] is not None:
        text += f', {number(row["peak_mib"])} MiB'
    if row['accuracy'] is not None:
        text += f', top-1 {row["accuracy"]:.2f} % of {row["images"]} images'
    return text


def show(rows):
    width = max(len(row['model']) for row in rows)
    print(f'\n{"model":{width}} {"size":>5} {"batch":>6} {"GFLOPs":>8} {"images/s":>9} '
          f'{"peak MiB":>9} {"MiB/image":>10} {"top-1, %":>9}')
    for r in rows:
        print(f'{r["model"]:{width}} {r["resolution"]:>5} {r["batch"]:>6} '
              f'{number(r["flops"] / 1e9):>8} {number(r["images_per_s"]):>9} '
              f'{number(r["peak_mib"]):>9} {number(r["mib_per_image"]):>10} '
              f'{"-" if r["accuracy"] is None else format(r["accuracy"], ".2f"):>9}  '
              f'{r["problem"]}')
    print('\nFLOPs (a multiply-add is 1) of a number of pixels, least squares: a line, and a '
          'power law')
    for name, fit in fits_of(rows).items():
        if fit is None:
            print(f'{name:{width}}  no fit: it needs {FEWEST} sizes')
            continue
        print(f'{name:{width}}  {fit["slope"] * 1e-3:.4g} G per megapixel '
              f'{"-" if fit["intercept"] < 0 else "+"} {abs(fit["intercept"]) * 1e-9:.3g} G, '
              f'off by up to {100 * fit["worst"]:.2f} % '
              f'of the largest, R2 {fit["r2"]:.5f}; pixels^{fit["exponent"]:.3f}')


def write(rows, setting, folder):
    """resolution.csv and .json."""
    write_csv(rows, COLUMNS, folder / 'resolution.csv')
    content = dict(setting=setting, fits=fits_of(rows), rows=rows)
    (folder / 'resolution.json').write_text(json.dumps(content, indent=2) + '\n')


# --- pictures ---------------------------------------------------------------------------------

def label_names(names):
    """Up to the first '_', behind which is the recipe, where that tells the models apart."""
    short = {name: name.split('_')[0] for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def draw_by_size(rows, column, log, ylabel, title, path):
    """A curve for each model over the side of the images."""
    figure, (ax,) = make_figure()
    labels, ends = label_names(list(by_model(rows))), []
    for i, (name, model_rows) in enumerate(by_model(rows).items()):
        points = [(r['resolution'], r[column]) for r in model_rows if r[column] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), **style_of(i))
            ends.append((*points[-1], labels[name], style_of(i)['color']))
    ax.set_xscale('log')
    plain_ticks(ax.xaxis, sorted({r['resolution'] for r in rows}))
    if log:
        ax.set_yscale('log')
        plain_ticks(ax.yaxis)
    finish(ax, title, 'side of the image, pixels', ylabel)
    figure.draw_without_rendering()
    label_ends(ax, ends)
    figure.savefig(path, dpi=130)


def draw_flops(rows, path):
    """Beside each other: linear axes with the fitted lines, logarithmic ones with power laws."""
    figure, (plain, log) = make_figure(2)
    labels, fits = label_names(list(by_model(rows))), fits_of(rows)
    ends = {plain: [], log: []}
    for i, (name, model_rows) in enumerate(by_model(rows).items()):
        pixels = np.array([r['resolution']**2 / 1e6 for r in model_rows])
        flops = np.array([r['flops'] / 1e9 for r in model_rows])
        style, fit = style_of(i), fits[name]
        for ax in (plain, log):
            ax.plot(pixels, flops, **{**style, 'linestyle': ''})
            text = labels[name]
            if fit is not None:
                x = np.linspace(pixels[0], pixels[-1], 200)
                if ax is plain:
                    y = (fit['slope'] * x * 1e6 + fit['intercept']) / 1e9
                    text += f': {100 * fit["worst"]:.1f} %'
                else:
                    y = fit['factor'] * (x * 1e6)**fit['exponent'] / 1e9
                    text += f': pixels$^{{{fit["exponent"]:.2f}}}$'
                ax.plot(x, y, color=style['color'], linewidth=1)
            ends[ax].append((pixels[-1], flops[-1], text, style['color']))
    log.set(xscale='log', yscale='log')
    plain_ticks(log.yaxis)
    plain_ticks(log.xaxis)
    for ax, title in ((plain, 'FLOPs of an image, and the straight lines nearest to them, with the '
                       'largest error\nin % of the largest FLOPs'),
                      (log, 'The same, and the power laws nearest to them')):
        finish(ax, title, 'pixels of the image, millions', 'GFLOPs (a multiply-add is 1)')
    figure.draw_without_rendering()
    for ax, points in ends.items():
        label_ends(ax, points)
    figure.savefig(path, dpi=130)


def draw_all(rows, setting, folder):
    """The pictures of what was measured; the names of their files.

    A picture of an earlier run, of what was not measured now, is removed.
    """
    where = f'{setting["device"]}, {setting["dtype"]}'
    panels = {
        'accuracy.png': ('accuracy', False, 'top-1 accuracy, %',
                         f'Accuracy, resizing and cropping of the test data scaled\n{where}'),
        'throughput.png': ('images_per_s', True, 'images/s',
                           f'Throughput of inference\n{where}'),
        'memory.png': ('mib_per_image', True, 'MiB for an image',
                       f'Peak memory of inference for each image, without weights\n{where}')}
    made = ['flops.png']
    draw_flops(rows, folder / 'flops.png')
    for file, (column, log, ylabel, title) in panels.items():
        if any(row[column] is not None for row in rows):
            draw_by_size(rows, column, log, ylabel, title, folder / file)
            made.append(file)
        else:
            (folder / file).unlink(missing_ok=True)
    return made
