"""What the reports of several analyses are made of: tables, Markdown, CSV files, figures."""

import csv
import math
import textwrap

LINES = ('-', '--', ':')


# --- text -----------------------------------------------------------------------------------

def number(value, digits=3):
    """Format a value with three digits at least, and no exponent."""
    if value is None:
        return '-'
    return f'{value:,.0f}' if abs(value) >= 10**digits else f'{value:.{digits}g}'


def print_table(lines):
    """Rows of text, the first of them the titles; all columns but the first end at the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print(line[0].ljust(widths[0]) + ''.join(f'  {cell:>{width}}' for cell, width in
                                                 zip(line[1:], widths[1:], strict=True)))


# --- Markdown -------------------------------------------------------------------------------

def markdown_table(lines):
    """The same rows for Markdown."""
    titles, *lines = lines
    return '\n'.join(f'| {" | ".join(row)} |'
                     for row in (titles, ('---', *['---:'] * (len(titles) - 1)), *lines))


def wrapped(text, first='', rest='', end=''):
    """Lines of at most 100 characters."""
    return f'{end}\n'.join(textwrap.wrap(
        text, 100 - len(end), initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False))


def bullets(lines):
    return '\n'.join(wrapped(line, '- ', '  ') for line in lines)


def command_block(command):
    """An indented command; its lines break before an option, not before the option's value."""
    command = command.replace(' ', '\xa0').replace('\xa0--', ' --')
    return wrapped(command, '    ', '        ', end=' \\').replace('\xa0', ' ')


# --- files ----------------------------------------------------------------------------------

def write_csv(rows, columns, path):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# --- pictures -------------------------------------------------------------------------------

def style_of(i):
    from vmamba_mm.mm.hooks.curves import COLOURS, MARKERS

    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=6,
                linestyle=LINES[i // len(COLOURS) % len(LINES)])


def make_figure(columns=1, height=4.4, rows=1):
    """A figure and its axes, from left to right and from top to bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * columns, height * rows), layout='constrained')
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def finish(ax, title, xlabel, ylabel):
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10, loc='left')
    ax.grid(alpha=0.3)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)


def plain_ticks(axis, values=None):
    """Numbers as they are read, on a logarithmic axis too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if values is None:
        low, high = axis.get_view_interval()
        subs = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
    else:
        axis.set_ticks(values)
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.10g}'))
