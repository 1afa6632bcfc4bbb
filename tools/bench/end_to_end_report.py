"""What end_to_end.py measures and reports: cases, requirements, CSV, tables, picture."""

import csv
import io
import math
from typing import NamedTuple

import matplotlib

from vmamba_mm.atomic import atomic_file, write_atomic
from vmamba_mm.errors import UserError

matplotlib.use('Agg')
import matplotlib.pyplot as plt

NAN = float('nan')
OURS = ('tiny_s1l8', 'small_s1l20', 'base_s1l20', 'tiny_s2l5', 'small_s2l15', 'base_s2l15',
        'vanilla_tiny', 'vanilla_small', 'vanilla_base')
#: family: the peers of each size; DeiT-S has nearly the parameters of the tiny models
FAMILIES = {'Swin': {'tiny': 'swin_t', 'small': 'swin_s', 'base': 'swin_b'},
            'ConvNeXt': {'tiny': 'convnext_t', 'small': 'convnext_s', 'base': 'convnext_b'},
            'DeiT': {'tiny': 'deit_s'}, 'MambaOut': {'tiny': 'mambaout_t'},
            'MambaVision': {'tiny': 'mambavision_t'}}
TINY = ('tiny_s1l8', *(peers['tiny'] for peers in FAMILIES.values()))
RESOLUTIONS = ((224, 64), (384, 32), (512, 16), (640, 16), (768, 8), (1024, 4))
NUMBERS = ('ms', 'images_per_s', 'peak_gib', 'error', 'grad_error')
#: rows compare only where these are the same; all of them are text
SETTING = ('device', 'torch', 'timm', 'dtype', 'shrink')
# Okabe and Ito's colours, told apart with every kind of colour vision; hatches, markers besides.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
HATCHES = ('', '//', '..', 'xx', '\\\\', '++')
MARKERS = 'osD^vP'


class Case(NamedTuple):
    """What is measured. ``output``: 'logits' of the classifier or 'maps' of the backbone."""
    model: str
    task: str = 'inference'
    how: str = 'eager'
    precision: str = 'autocast'
    batch: int = 128
    height: int = 224
    width: int = 224
    output: str = 'logits'

    @property
    def what(self):
        """All but the model, for people."""
        maps = ', maps' if self.output == 'maps' else ''
        return (f'{self.task} {self.how} {self.precision}, batch {self.batch}, '
                f'{self.height}x{self.width}{maps}')


# --- what is required of an H100 --------------------------------------------------------------

class Requirement(NamedTuple):
    """``anchors``: the official VMamba, Swin-T and ConvNeXt-T."""
    case: Case
    number: str
    anchors: tuple[float, float, float]
    required: float
    aim: float = NAN


_TRAIN = Case('tiny_s1l8', 'forward+backward')
_ONE = Case('tiny_s1l8', batch=1)
REQUIREMENTS = [
    Requirement(Case('tiny_s1l8'), 'images_per_s', (2872, 5128, 7368), 8600, 10000),
    Requirement(Case('tiny_s1l8', how='compiled', precision='pure'), 'images_per_s',
                (NAN, 10433, 15248), 10500, 15300),
    Requirement(_TRAIN, 'images_per_s', (1089, 1938, 2537), 2830, 3300),
    Requirement(_TRAIN._replace(how='compiled'), 'images_per_s', (NAN, 3499, 3777), 3500, 3800),
    Requirement(_TRAIN, 'peak_gib', (12.0, 9.0, 8.0), 8.0, 6.5),
    Requirement(_ONE, 'ms', (24.7, 9.0, 5.6), 5.5, 4.0),
    Requirement(_ONE._replace(how='graph'), 'ms', (NAN, NAN, NAN), 1.8, 1.2),
    Requirement(_ONE._replace(height=800, width=1280, output='maps'), 'ms', (18.4, 10.7, 5.3),
                5.3, 3.0),
    Requirement(Case('tiny_s1l8', batch=4, height=1024, width=1024), 'images_per_s',
                (140, 221, 289), 420, 600)]
#: official images/s of inference and of forward+backward
_OFFICIAL = {'small_s1l20': (1978, 709), 'base_s1l20': (1594, 561), 'tiny_s2l5': (2284, 842),
             'small_s2l15': (1580, 554), 'base_s2l15': (1234, 430), 'vanilla_tiny': (837, 259)}
for _model, _speeds in _OFFICIAL.items():
    _factors = (3.0, 3.0) if _model == 'vanilla_tiny' else (2.8, 2.4)
    REQUIREMENTS += [
        Requirement(Case(_model, _task), 'images_per_s', (_speed, NAN, NAN), _factor * _speed)
        for _task, _speed, _factor in zip(('inference', 'forward+backward'), _speeds, _factors,
                                          strict=True)]
GROWTH_ANCHORS, GROWTH_LIMIT = (0.92, 1.06, 1.13), 1.0


def judge(value, limit, higher_is_better=False):
    """'met' or 'MISSED'; nothing without a value or a limit."""
    if math.isnan(value) or math.isnan(limit):
        return ''
    return 'met' if (value >= limit if higher_is_better else value <= limit) else 'MISSED'


# --- rows -----------------------------------------------------------------------------------

def write_rows(path, rows, kind=Case, numbers=NUMBERS, setting=SETTING):
    text = io.StringIO()
    writer = csv.DictWriter(text, [*kind._fields, *numbers, 'problem', *setting])
    writer.writeheader()
    writer.writerows({**case._asdict(), **row} for case, row in rows.items())
    write_atomic(text.getvalue().encode(), path)


def read_rows(path, kind=Case, numbers=NUMBERS, setting=SETTING):
    """{case: row} of a file of write_rows; ``kind`` has a default for all but its first field."""
    rows = {}
    try:
        with open(path, newline='') as file:
            for line in csv.DictReader(file):
                case = kind(*(type(default)(line[name]) for name, default in
                              kind('')._asdict().items()))
                rows[case] = {name: float(line[name]) for name in numbers}
                rows[case] |= {name: line[name] for name in ('problem', *setting)}
    except (KeyError, ValueError, TypeError, csv.Error) as err:
        raise UserError(f'{path} is no CSV file of this tool: {err!r}') from err
    return rows


def find_setting(rows, names=SETTING):
    """The setting that all rows have.

    Raises:
        UserError: if they have several: their times do not compare.
    """
    values = {name: sorted({row[name] for row in rows.values()}) for name in names}
    differing = [f'{name} {" and ".join(v)}' for name, v in values.items() if len(v) > 1]
    if differing:
        raise UserError(f'rows of different settings do not compare: {"; ".join(differing)}')
    return {name: v[0] for name, v in values.items()}


def number(rows, case, name):
    return rows[case][name] if case in rows else NAN


def time_per_pixel(rows, model):
    """{side: nanoseconds} along the resolutions, as far as they were measured."""
    speeds = {side: number(rows, Case(model, batch=batch, height=side, width=side),
                           'images_per_s') for side, batch in RESOLUTIONS}
    return {side: 1e9 / speed / side**2 for side, speed in speeds.items() if speed > 0}


# --- tables ---------------------------------------------------------------------------------

def show(value, unit=''):
    """Three digits, or all that stand before the point; '-' for NaN."""
    if math.isnan(value):
        return '-'
    return (f'{value:.0f}' if value >= 100 else f'{value:.3g}') + unit


def print_table(title, head, lines):
    """Text in the first column, numbers in the others; nothing without lines."""
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    print(f'\n{title}')
    for first, *others in (head, *lines):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print('  '.join([first.ljust(widths[0]), *cells]).rstrip())


def print_ratios(rows):
    lines = []
    for case, row in rows.items():
        if case.model not in OURS:
            continue
        size = next(size for size in ('tiny', 'small', 'base') if size in case.model)
        cells = []
        for peers in FAMILIES.values():
            peer = case._replace(model=peers.get(size, ''))
            faster = row['images_per_s'] / number(rows, peer, 'images_per_s')
            memory = row['peak_gib'] / number(rows, peer, 'peak_gib')
            cells.append('' if math.isnan(faster) else f'{faster:.2f}'
                         + ('' if math.isnan(memory) else f' | {memory:.2f}'))
        if any(cells):
            lines.append([f'{case.model}: {case.what}', *cells])
    print_table('Times as fast as the peer of its size, measured beside it | peak memory by its',
                ['', *FAMILIES], lines)


def print_requirements(rows, setting):
    """Of all that was measured; the verdicts are for the GPU that the requirements are for."""
    lines = []
    counts = 'H100' in setting['device'] and setting['dtype'] == 'float16' \
        and setting['shrink'] == '1'
    for case, name, anchors, required, aim in REQUIREMENTS:
        value = number(rows, case, name)
        higher = name == 'images_per_s'
        unit = {'images_per_s': 'images/s', 'ms': 'ms', 'peak_gib': 'peak GiB'}[name]
        lines.append([f'{case.model}: {case.what}, {unit}', value, anchors, required, aim, higher])
    growth = time_per_pixel(rows, 'tiny_s1l8')
    lines.append(['tiny_s1l8: time per pixel at 1024 by that at 224',
                  growth.get(1024, NAN) / growth.get(224, NAN), GROWTH_ANCHORS, GROWTH_LIMIT, NAN,
                  False])
    cells = [[what, show(value), *(show(a) for a in anchors), show(required),
              judge(value, required, higher) if counts else '', show(aim),
              judge(value, aim, higher) if counts else '']
             for what, value, anchors, required, aim, higher in lines if not math.isnan(value)]
    print_table('Required of an H100 in fp16. Official, Swin-T, ConvNeXt-T: published anchors, '
                'measured by us on an H100'
                + ('' if counts else '\n(this run is on another device, dtype or size: '
                   'no verdicts)'),
                ['', 'here', 'official', 'Swin-T', 'ConvNeXt-T', 'required', '', 'aim', ''], cells)


def print_rows(rows):
    print_table('Medians; error: relative 2-norm from fp32 on the CPU, of the output and of the '
                "parameters' gradient",
                ['', 'ms', 'images/s', 'peak GiB', 'error', 'grad'],
                [[f'{case.model}: {case.what}', show(row['ms']), show(row['images_per_s']),
                  show(row['peak_gib']), *('' if math.isnan(row[e]) else f'{row[e]:.0e}'
                                           for e in ('error', 'grad_error'))]
                 for case, row in rows.items() if not row['problem']])
    problems = {}
    for case, row in rows.items():
        if row['problem']:
            problems.setdefault((case.model, row['problem']), []).append(case.what)
    if problems:
        print('\nNot measured')
    for (model, problem), cases in problems.items():
        everything = len(cases) == sum(case.model == model for case in rows)
        print(f'{model}: {problem}' + ('' if everything else f' ({"; ".join(cases)})'))


# --- picture --------------------------------------------------------------------------------

def plot(rows, path, title):
    """At most four panels, those that have rows."""
    rows = {case: row for case, row in rows.items() if not row['problem']}
    models = [m for m in (*OURS, *(p for f in FAMILIES.values() for p in f.values()))
              if any(case.model == m for case in rows)]
    tiny = [m for m in TINY if m in models] or models[:len(COLOURS)]
    looks = {m: (COLOURS[i], HATCHES[i], MARKERS[i]) for i, m in enumerate(tiny)}
    one = {case for case in rows if case.batch == 1 and case.task == 'inference'}
    many = {case for case in rows if case.batch == 128}
    panels = [
        (draw_bars, many, tiny, 'images_per_s', 'images/s, batch 128, 224x224'),
        (draw_bars, one, tiny, 'ms', 'one image: ms of inference'),
        (draw_growth, rows, tiny, None, 'inference: ns a pixel, batch 64 at 224 to 4 at 1024'),
        (draw_all, {case for case in many if case.how == 'eager'}, models, 'images_per_s',
         'images/s, eager, autocast; figures: peak GiB')]
    panels = [panel for panel in panels if any(case.model in panel[2] for case in panel[1])]
    panels = [p for p in panels if p[0] is not draw_growth
              or any(len(time_per_pixel(rows, m)) > 1 for m in tiny)]
    if not panels:
        raise UserError(f'there is nothing to draw: {path} was not written')
    columns = min(2, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False,
                                figsize=(7 * columns, 4.6 * -(-len(panels) // columns)),
                                layout='constrained')
    for ax, (draw, cases, shown, name, label) in zip(axes.flat, panels, strict=False):
        draw(ax, rows, cases, shown if draw is draw_all else looks, name)
        ax.set_title(label, fontsize=11)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def draw_bars(ax, rows, cases, models, name):
    """A group of bars for each kind of case, a colour and hatch for each model."""
    groups = list(dict.fromkeys(case._replace(model='') for case in rows
                                if case in cases and case.model in models))
    models = {m: look for m, look in models.items() if any(case.model == m for case in cases)}
    width = 0.8 / len(models)
    for i, (model, (colour, hatch, _)) in enumerate(models.items()):
        heights = [number(rows, group._replace(model=model), name) for group in groups]
        bars = ax.bar([x + (i - (len(models) - 1) / 2) * width for x in range(len(groups))],
                      heights, width, label=model, color=colour, hatch=hatch, edgecolor='white',
                      linewidth=0.5)
        ax.bar_label(bars, ['' if math.isnan(h) else show(h) for h in heights], fontsize=6,
                     rotation=90, padding=2)
    sizes = len({(group.height, group.width) for group in groups}) > 1
    ax.set_xticks(range(len(groups)), [
        '\n'.join([group.task, f'{group.how}, {group.precision}']
                  + [f'{group.height}x{group.width}'] * sizes) for group in groups], fontsize=7)
    ax.margins(y=0.15)
    ax.legend(fontsize=8)


def draw_growth(ax, rows, cases, models, name):
    for model, (colour, _, marker) in models.items():
        found = time_per_pixel(rows, model)
        if found:
            ax.plot(list(found), list(found.values()), label=model, color=colour, marker=marker)
    ax.set(xlabel='side of the image', xticks=[side for side, _ in RESOLUTIONS])
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)


def draw_all(ax, rows, cases, models, name):
    """All models, a bar for inference and one for forward+backward."""
    models = [m for m in models if any(case.model == m for case in cases)][::-1]
    for i, (task, colour) in enumerate((('inference', COLOURS[0]),
                                        ('forward+backward', COLOURS[1]))):
        found = [Case(model, task) for model in models]
        bars = ax.barh([y + 0.2 - 0.4 * i for y in range(len(models))],
                       [number(rows, case, name) for case in found], 0.38, label=task,
                       color=colour, hatch=HATCHES[i], edgecolor='white', linewidth=0.5)
        ax.bar_label(bars, [show(number(rows, case, 'peak_gib')).strip('-') for case in found],
                     fontsize=7, padding=3)
    ax.set_yticks(range(len(models)), models, fontsize=8)
    ax.margins(x=0.1)
    ax.legend(fontsize=8)
