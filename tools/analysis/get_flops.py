"""Parameters and FLOPs of models, part by part: classifiers, detectors, segmentors.

Counted are matrix products, convolutions and the selective scan, which costs 9 B L D N and, for
its skip, B L D (arXiv 2401.10166): B images, L positions, D channels of all routes, N states. One
multiply-add is 1; --unit flop counts it as 2. Shown apart is what fvcore and mmengine, the
counters behind the published numbers, count besides: norms, resizing, pooling. Weights and images
are not needed, and nothing is computed.
"""

import csv
import dataclasses
import json
from pathlib import Path

from vmamba_mm import zoo
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, flops
from vmamba_mm.mm.compat import prepare_mm
from vmamba_mm.mm.tasks import task_named

EXAMPLES = """\
  python tools/analysis/get_flops.py configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py
  python tools/analysis/get_flops.py CONFIG --shape 512 2048 --unit flop
  python tools/analysis/get_flops.py CONFIG mmpretrain::resnet/resnet50_8xb32_in1k.py
  python tools/analysis/get_flops.py --published            # beside the published numbers"""

UNITS = {'mac': (1, 'one multiply-add counts as 1'), 'flop': (2, 'one multiply-add counts as 2')}


def find_tables():
    """{name: published models with their FLOPs}: those of one data set, each architecture once."""
    tables = {}
    for entry in zoo.entries():
        table = tables.setdefault(entry.dataset.lower().partition('-')[0], {})
        if entry.flops is not None:
            table.setdefault((entry.family, entry.arch), entry)  # whatever the schedule
    return {name: list(table.values()) for name, table in tables.items() if table}


TABLES = find_tables()
GREYS = ('#444444', '#AAAAAA', '#777777')
HATCHES = ('//', '', 'xx', '..', '\\\\')
COLUMNS = ('table', 'config', 'height', 'width', 'part', 'kind', 'parameters', 'flops',
           'multiply-add')


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('configs', metavar='CONFIG', nargs='*',
                        help='a config file, or a stock one as mmdet::folder/name.py')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help='size of the image (default: 224 224 for a classifier, 1280 800 for '
                        'a detector, 512 2048 for a segmentor)')
    parser.add_argument('--unit', choices=UNITS, default='mac',
                        help='whether a multiply-add counts as 1 (mac, as in the papers) or as 2 '
                        '(flop) (default: mac)')
    parser.add_argument('--published', nargs='*', choices=TABLES, metavar='TABLE',
                        help='instead of CONFIG: the published models beside their published '
                        f'numbers, of {", ".join(TABLES)} (default: all)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/flops'), metavar='FOLDER',
                        help='where the CSV, JSON and PNG are written (default: work_dirs/flops)')
    cli.add_common_options(parser, launcher=False)
    args = parser.parse_args()
    if bool(args.configs) == (args.published is not None):
        raise UserError('name at least one CONFIG, or else --published')
    if args.published is not None and (args.shape or args.cfg_options or args.unit != 'mac'):
        raise UserError('--published has its own sizes, settings and unit')
    if args.shape and min(args.shape) < 1:
        raise UserError(f'--shape takes a height and a width of at least 1, not {args.shape}')
    return args


# --- one model --------------------------------------------------------------------------------

def metric(value):
    return f'{value / 1e9:,.3f} G' if value >= 1e9 else f'{value / 1e6:,.3f} M'


def print_count(name, count, unit):
    """The table of one model."""
    factor, meaning = UNITS[unit]
    print(f'\n{name}, image of {count.shape[0]}x{count.shape[1]}')
    print(f'{"":24}{"parameters":>14}{"FLOPs":>16}')
    for row in count.rows:
        label = f'  {row.kind}' if row.kind else row.part
        parameters = '' if row.parameters is None else f'{row.parameters:,}'
        print(f'{label:24}{parameters:>14}{metric(factor * row.flops):>16}')
    print(f'{"total":24}{count.parameters:>14,}{metric(factor * count.flops):>16}   {meaning}')
    extras = {k: v for k, v in count.extras.items() if v}
    if extras:
        print('beside it, as fvcore and mmengine count: '
              + ', '.join(f'{k} {metric(factor * v)}' for k, v in extras.items())
              + f'; with them {metric(factor * (count.flops + sum(extras.values())))}')
    for note in count.notes:
        print(note)


def count_config(path, options, shape):
    return flops.count(cli.load_config(path, options), shape)


# --- beside the published numbers ---------------------------------------------------------------

def digits_of(entries):
    """The number of digits of a GFLOP that a table was published with."""
    return next(digits for digits in range(10)
                if not any(entry.flops % 10**(9 - digits) for entry in entries))


def compare(entry, count, digits):
    """Whether the count agrees with the published FLOPs to the printed digit, or why not."""
    def printed(value):
        return round(value / 1e9, digits)

    extras = {k: v for k, v in count.extras.items() if v >= 0.5e6}
    with_extras = 'with ' + ', '.join(f'{k} {v / 1e9:.3f}' for k, v in extras.items())
    if round(count.parameters / 1e6) != round(entry.parameters / 1e6):
        return f'differs by {count.parameters - entry.parameters:,} parameters'
    if printed(count.flops) == printed(entry.flops):
        return 'agrees'
    total = count.flops + sum(count.extras.values())
    if printed(total) == printed(entry.flops):
        return f'agrees {with_extras}'
    return entry.metadata.get('FLOPs Note') \
        or f'differs by {(entry.flops - total) / 1e9:.3f} G, {with_extras}'


def print_published(tables):
    """Each model on a line as soon as it is counted; all of them, with the verdicts."""
    counts = []
    print(f'{UNITS["mac"][1]}; "all" adds norms, resizing and pooling, which the authors\' '
          'counters (fvcore, mmengine) count;\npublished: by the authors, on their release page')
    for table in tables:
        # Each family's authors print as they like.
        digits_by = {family: digits_of([e for e in TABLES[table] if e.family == family])
                     for family in {e.family for e in TABLES[table]}}
        height, width = task_named(TABLES[table][0].task).image
        names = [f'{entry.family}/{entry.arch}' for entry in TABLES[table]]
        wide = max(map(len, names)) + 1
        print(f'\n{table}, {height}x{width} unless the name says more\n'
              f'{"":{wide}}{"parameters":>24}{"FLOPs":>29}\n'
              f'{"":{wide}}{"counted":>13}{"published":>11}{"counted":>10}{"all":>10}'
              f'{"published":>11}')
        for name, entry in zip(names, TABLES[table], strict=True):
            side, digits = entry.metadata.get('Image Size'), digits_by[entry.family]
            count = flops.count(cli.load_config(str(entry.path)), side and (side, side))
            verdict = compare(entry, count, digits)
            total = count.flops + sum(count.extras.values())
            print(f'{name:{wide}}{count.parameters:>13,}{f"{entry.parameters / 1e6:.0f} M":>11}'
                  f'{count.flops / 1e9:>10.3f}{total / 1e9:>10.3f}'
                  f'{f"{entry.flops / 1e9:.{digits}f} G":>11}  {verdict}', flush=True)
            counts.append((table, entry.arch, count, dict(
                all_flops=total, published_parameters=entry.parameters,
                published_flops=entry.flops, verdict=verdict)))
    return counts


# --- files --------------------------------------------------------------------------------------

def write(counts, unit, folder, stem):
    """CSV (a line for each part), JSON (everything) and a picture of (table, name, count, more)."""
    factor, meaning = UNITS[unit]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'{stem}.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for table, name, count, _ in counts:
            for row in count.rows:
                writer.writerow((table, name, *count.shape, row.part, row.kind, row.parameters,
                                 factor * row.flops, factor))
            for extra, value in count.extras.items():
                writer.writerow((table, name, *count.shape, 'not in the sum', extra, None,
                                 factor * value, factor))
    models = [dict(table=table, config=name, shape=count.shape, parameters=count.parameters,
                   flops=factor * count.flops,
                   rows=[dataclasses.asdict(r) | {'flops': factor * r.flops} for r in count.rows],
                   extras={k: factor * v for k, v in count.extras.items()}, notes=count.notes,
                   **more) for table, name, count, more in counts]
    (folder / f'{stem}.json').write_text(json.dumps(dict(unit=meaning, models=models), indent=1))
    draw(counts, unit, folder / f'{stem}.png')
    print(f'\nWritten: {folder / stem}.csv, .json, .png')


def shares(count):
    """Label -> FLOPs of what a bar is made of: the backbone's kinds, then the other parts."""
    flops_of = {}
    split = {row.part for row in count.rows if row.kind}
    for row in count.rows:
        label = f'{row.part}: {row.kind}' if row.kind else row.part.rpartition('.')[2]
        if row.kind or row.part not in split:
            flops_of[label] = flops_of.get(label, 0) + row.flops
    return {label: value for label, value in flops_of.items() if value}


def draw(counts, unit, path):
    """A bar for each model, by parts; a panel for each table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vmamba_mm.mm.hooks.curves import COLOURS
    from vmamba_mm.mm.text import drawable

    tables = list(dict.fromkeys(table for table, *_ in counts))
    sizes = [sum(t == table for t, *_ in counts) for table in tables]
    kinds = [f'backbone: {kind}' for kind in flops.KINDS]
    other_labels = dict.fromkeys(label for *_, count, _ in counts for label in shares(count))
    other_labels = [label for label in other_labels if label not in kinds]
    # The backbone in colours that are always the same, the rest grey and hatched.
    style = {label: dict(color=colour) for label, colour in zip(kinds, COLOURS, strict=False)}
    style |= {label: dict(color=GREYS[i % len(GREYS)], hatch=HATCHES[i % len(HATCHES)])
              for i, label in enumerate(other_labels)}
    shown_names = {name: drawable(name) for _, name, *_ in counts}
    figure = Figure(figsize=(10, 1.6 + 0.8 * len(tables) + 0.36 * len(counts)),
                    layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, height_ratios=[1 + n for n in sizes], squeeze=False)
    factor, meaning = UNITS[unit]
    handles = {}
    for axes, table in zip(panels[:, 0], tables, strict=True):
        models = [(name, count) for t, name, count, _ in counts if t == table]
        for y, (_, count) in enumerate(models):
            left = 0
            for label, value in shares(count).items():
                width = factor * value / 1e9
                bar = axes.barh(y, width, left=left, label=label, edgecolor='white',
                                linewidth=0.5, **style[label])
                handles.setdefault(label, bar)
                left += width
            axes.text(left, y, f' {left:#.3g}' if left < 100 else f' {left:.0f}', va='center')
        axes.set_yticks(range(len(models)), [shown_names[name] for name, _ in models])
        axes.set(xlabel=f'GFLOPs, {meaning}', title=table, ylim=(len(models) - 0.4, -0.6))
        axes.margins(x=0.09)
        for side in ('top', 'right'):
            axes.spines[side].set_visible(False)
    shown = {label: handles[label] for label in style if label in handles}
    figure.legend(shown.values(), shown, loc='outside upper center', ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    prepare_mm()
    if args.published is not None:
        counts = print_published(args.published or TABLES)
        write(counts, args.unit, args.out_dir, 'published')
        return
    counts = []
    for path in args.configs:
        count = count_config(path, args.cfg_options, args.shape)
        name = Path(path.rpartition('::')[2]).stem
        print_count(name, count, args.unit)
        counts.append((f'{count.shape[0]}x{count.shape[1]}', name, count, {}))
    write(counts, args.unit, args.out_dir, counts[0][1] if len(counts) == 1 else 'models')


if __name__ == '__main__':
    cli.run(main)
