"""Exponents, table, picture and Markdown of tools/analysis/complexity.py.

A row is one repeat of one length of one mixer; what was not measured is None.
"""

import json
import statistics
from typing import NamedTuple

import numpy as np
from curve_labels import label_ends
from mixers import MIXERS
from report_parts import (
    bullets,
    command_block,
    finish,
    make_figure,
    markdown_table,
    number,
    optional,
    plain_ticks,
    print_table,
    read_results,
    style_of,
    wrapped,
    write_csv,
)

KINDS = dict(mixer=str, length=int, repeat=optional(int),
             **{name: optional(float) for name in ('train_ms', 'train_mib', 'token_ms')},
             state_bytes=optional(int), token_mib=optional(float), problem=str)
COLUMNS = tuple(KINDS)
EMPTY = dict.fromkeys(COLUMNS) | dict(problem='')
FEWEST = 2  # lengths that a slope needs


class Measure(NamedTuple):
    title: str
    unit: str
    scale: float  #: from the column's unit to this one


MEASURES = {
    'train_ms': Measure('Time of a training step', 'ms', 1),
    'train_mib': Measure('Peak memory of a training step', 'MiB', 1),
    'token_ms': Measure('Time of one more token', 'ms', 1),
    'state_bytes': Measure('Memory kept of all tokens before', 'KiB', 2**-10),
}


# --- files ----------------------------------------------------------------------------------

def write(rows, setting, folder):
    write_csv(rows, COLUMNS, folder / 'complexity.csv')
    (folder / 'complexity.json').write_text(json.dumps(
        dict(setting=setting, exponents=exponents(rows)), indent=2) + '\n')


def read(folder):
    """The rows and the setting that :func:`write` left.

    Raises:
        UserError: if they are not there, or not of this tool.
    """
    return read_results(folder, 'complexity', KINDS)


# --- numbers --------------------------------------------------------------------------------

def fit_exponent(lengths, values):
    """(exponent, its standard error, the lengths) of a power of the length.

    A least-squares line through the logarithms, over the upper half of the lengths that are there.

    Args:
        lengths, values: of all measurements; a length may occur several times.

    Returns:
        None where there are fewer than two lengths, or a value that is not above 0. The error is
        None where the line has as many parameters as there are points.
    """
    there = sorted(set(lengths))
    upper = there[len(there) // 2:] if len(there) // 2 + FEWEST <= len(there) else there[-FEWEST:]
    points = [(x, y) for x, y in zip(lengths, values, strict=True) if x in upper]
    if len(upper) < FEWEST or any(y <= 0 for _, y in points):
        return None
    x, y = np.log(np.array(points, float)).T
    slope, intercept = np.polyfit(x, y, 1)
    error = None
    if len(points) > 2:
        left = np.square(y - slope * x - intercept).sum() / (len(points) - 2)
        error = float(np.sqrt(left / np.square(x - x.mean()).sum()))
    return float(slope), error, upper


def points_of(rows, mixer, column):
    return [(row['length'], row[column]) for row in rows
            if row['mixer'] == mixer and row[column] is not None]


def mixers_of(rows):
    return list(dict.fromkeys(row['mixer'] for row in rows))


def exponents(rows):
    """{mixer: {column: (exponent, error, lengths) or None}}."""
    found = {}
    for mixer in mixers_of(rows):
        points = {column: points_of(rows, mixer, column) for column in MEASURES}
        found[mixer] = {column: fit_exponent(*zip(*p, strict=True)) if p else None
                        for column, p in points.items()}
    return found


def medians(rows, mixer, column):
    """[(length, median of the repeats)], from short to long."""
    by_length = {}
    for length, value in points_of(rows, mixer, column):
        by_length.setdefault(length, []).append(value)
    return [(length, statistics.median(values)) for length, values in sorted(by_length.items())]


# --- text -----------------------------------------------------------------------------------

def power(fit, digits=2):
    if fit is None:
        return '-'
    slope, error, _ = fit
    slope = round(slope, digits) + 0.0  # no -0.00
    return f'{slope:.{digits}f}' + ('' if error is None else f' ± {error:.{digits}f}')


def describe(rows):
    """A line on the repeats of one length."""
    first = rows[0]
    text = f'{MIXERS[first["mixer"]].label} at {first["length"]:,} tokens: '
    if first['train_ms'] is None:
        return text + first['problem']

    def median(column):
        values = [row[column] for row in rows if row[column] is not None]
        return number(statistics.median(values)) if values else '-'

    return (f'{text}training {median("train_ms")} ms, {median("train_mib")} MiB; a token '
            f'{median("token_ms")} ms, {number(first["state_bytes"] / 2**10)} KiB kept')


def table(rows):
    """Rows of text, the first of them the titles: exponents, as measured and in theory."""
    lines = [('mixer', 'training, time', 'in theory', 'training, memory', 'a token, time',
              'a token, memory', 'in theory')]
    for mixer, fits in exponents(rows).items():
        theory = MIXERS[mixer]
        lines.append((theory.label, power(fits['train_ms']), str(theory.training),
                      power(fits['train_mib']), power(fits['token_ms']),
                      power(fits['state_bytes']), str(theory.token)))
    return lines


def values_table(rows):
    """Rows of text: the longest length of each mixer."""
    measures = dict(MEASURES)
    if any(row['token_mib'] is not None for row in rows):
        measures['token_mib'] = Measure('Peak memory of one more token', 'MiB', 1)
    lines = [('mixer', 'tokens', *(f'{m.title.lower()}, {m.unit}' for m in measures.values()))]
    for mixer in mixers_of(rows):
        found = {column: dict(medians(rows, mixer, column)) for column in measures}
        if found['train_ms']:
            longest = max(found['train_ms'])
            lines.append((MIXERS[mixer].label, f'{longest:,}', *(
                number(found[c][longest] * m.scale) if longest in found[c] else '-'
                for c, m in measures.items())))
    return lines


def show(rows):
    print('\nExponents of the length, over the upper half of the lengths', end='')
    print_table(table(rows))
    print('\nAt the longest length', end='')
    print_table(values_table(rows))
    for problem in dict.fromkeys(f'{MIXERS[r["mixer"]].label}: {r["problem"]}' for r in rows
                                 if r['problem']):
        print(problem)


# --- picture --------------------------------------------------------------------------------

def draw(rows, setting, path):
    """A panel for each measure, with the fitted powers drawn through their lengths."""
    figure, axes = make_figure(2, rows=2)
    fits, styles = exponents(rows), {m: style_of(i) for i, m in enumerate(MIXERS)}
    for ax, (column, measure) in zip(axes, MEASURES.items(), strict=True):
        ends = []
        for mixer in mixers_of(rows):
            points = [(x, y * measure.scale) for x, y in medians(rows, mixer, column) if y > 0]
            if not points:
                continue
            text = MIXERS[mixer].label
            ax.plot(*zip(*points, strict=True), **styles[mixer])
            if fits[mixer][column] is not None:
                text += f': L^{power((fits[mixer][column][0], None, None))}'
            ends.append((*points[-1], text, styles[mixer]['color']))
        if not ends:
            ax.set_visible(False)
            continue
        ax.set(xscale='log', yscale='log')
        ax.set_xscale('log', base=2)
        plain_ticks(ax.xaxis, sorted({row['length'] for row in rows}))
        ax.tick_params(axis='x', labelrotation=30)
        plain_ticks(ax.yaxis)
        finish(ax, measure.title, 'tokens', measure.unit)
        figure.draw_without_rendering()
        label_ends(ax, ends)
    figure.suptitle(f'{setting["device"]}, {setting["dtype"]}: {setting["depth"]} blocks of '
                    f'{setting["embed_dims"]} channels, batch {setting["batch_size"]}; powers of '
                    'the length L over its upper half', fontsize=10)
    figure.savefig(path, dpi=100)


# --- Markdown -------------------------------------------------------------------------------

LIMITS = (
    'A power of the length is a summary: where a part that does not grow still counts, it is below '
    'that of theory, and it rises with the lengths.',
    'Fused softmax attention keeps no matrix of all pairs, so its memory in training grows as that '
    'of the others do; its time does not.',
    'Small models without MLP, so that mixers count; the times are those of this implementation on '
    'this device.',
)


def markdown(rows, setting, picture):
    """The report; ``picture`` is its name relative to the report."""
    s = setting
    lengths = sorted({row['length'] for row in rows})
    upper = max((fit[2] for fits in exponents(rows).values() for fit in fits.values() if fit),
                key=len, default=lengths)
    intro = (f'Language models of {s["depth"]} blocks and {s["embed_dims"]} channels that differ '
             f'in their mixer alone, at {lengths[0]:,} to {lengths[-1]:,} tokens, batch '
             f'{s["batch_size"]}. The exponents say with which power of the length a number '
             f'grows, with the standard error of the fit, over {upper[0]:,} to {upper[-1]:,} '
             'tokens.')
    measured = (f'{s["device"]}, {s["dtype"]}{" autocast" if s["dtype"] == "bf16" else ""}; torch '
                f'{s["torch"]}, vmamba_mm {s["vmamba_mm"]}, Python {s["python"]}; the median of '
                f'{s["repeats"]} measurements.')
    problems = dict.fromkeys(f'{MIXERS[r["mixer"]].label}: {r["problem"]}.' for r in rows
                             if r['problem'])
    return f"""\
# Time and memory against length

{wrapped(intro)}

{markdown_table(table(rows))}

![Time and memory against length]({picture})

At the longest length:

{markdown_table(values_table(rows))}

Measured with this command:

{command_block(s['command'])}

{bullets([measured, *LIMITS, *problems])}
"""


def write_report(rows, setting, path):
    """The Markdown, and the picture under the same name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix('.png')
    draw(rows, setting, picture)
    path.write_text(markdown(rows, setting, picture.name))
