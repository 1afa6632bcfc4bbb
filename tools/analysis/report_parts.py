"""What several analyses and their reports are made of: tables, Markdown, CSV files, options,
figures."""

import csv
import json
import math
import textwrap

from vmamba_mm.errors import UserError

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


def optional(kind):
    """A kind of column that may be empty, for :func:`read_results`."""
    return lambda text: kind(text) if text else None


def read_results(folder, name, kinds):
    """The rows of ``NAME.csv`` and the setting of ``NAME.json``.

    Args:
        kinds: {column: what makes a value of its text}.

    Raises:
        UserError: if they are not there, or not of this tool.
    """
    try:
        with open(folder / f'{name}.csv', newline='') as file:
            rows = [{key: kind(row[key]) for key, kind in kinds.items()}
                    for row in csv.DictReader(file)]
        return rows, json.loads((folder / f'{name}.json').read_text())['setting']
    except FileNotFoundError as err:
        raise UserError(f'{err.filename} does not exist: --results takes the --out of an earlier '
                        'call') from err
    except (KeyError, ValueError, TypeError) as err:
        raise UserError(f'{folder} holds no results of this tool: {type(err).__name__} {err}') \
            from err


# --- options --------------------------------------------------------------------------------

def check_options(args, *names):
    """Raise one line unless these options, or all of their values, are above 0, and --report is a
    Markdown file."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not one > 0:
                raise UserError(f'--{name.replace("_", "-")} must be above 0, not {one}')
    if args.report and args.report.suffix != '.md':
        raise UserError(f'--report takes the name of a Markdown file (.md), not {args.report}')


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
