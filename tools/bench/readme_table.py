"""Write the tables of README.md and docs/performance.md from what end_to_end.py and dense_steps.py
measured.

What stands between the lines "<!-- speed -->" and "<!-- /speed -->" is replaced by the first table,
and between "<!-- performance -->" and "<!-- /performance -->" by all of them. The rows of all CSV
files must be of one device and torch.
"""

import math
from pathlib import Path

import dense_steps_report as steps
import end_to_end_report as report
from bench_report import find_setting, markdown_table, number, show
from end_to_end_report import FAMILIES, OURS, Case

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = '''  python tools/bench/readme_table.py --models a.csv b.csv --steps steps.csv'''
ALL, FIRST = 'performance', 'speed'  # the places in a file
TINY = {'tiny_s1l8': 'VMamba-T (`tiny_s1l8`)', 'swin_t': 'Swin-T', 'convnext_t': 'ConvNeXt-T'}
PEERS = {name: f'{family}-{size[0].upper()}' for family in ('Swin', 'ConvNeXt')
         for size, name in FAMILIES[family].items()}
_TRAIN = Case('', 'forward+backward')
_LARGE = dict(height=800, width=1280, output='maps')
LINES = [
    ('inference, images/s', Case(''), 'images_per_s'),
    ('inference, fp16 parameters, images/s', Case('', precision='pure'), 'images_per_s'),
    ('the same, compiled', Case('', how='compiled', precision='pure'), 'images_per_s'),
    ('forward + backward, images/s', _TRAIN, 'images_per_s'),
    ('the same, compiled', _TRAIN._replace(how='compiled'), 'images_per_s'),
    ("the same, compiled with mode='max-autotune'", _TRAIN._replace(how='max-autotune'),
     'images_per_s'),
    ('peak memory of forward + backward, GiB', _TRAIN, 'peak_gib'),
    ('one image, ms', Case('', batch=1), 'ms'),
    ('one image, CUDA graph, ms', Case('', batch=1, how='graph'), 'ms'),
    ('one image of 800x1280, the maps, ms', Case('', batch=1, **_LARGE), 'ms'),
    ('one image of 800x1280, the maps, CUDA graph, ms', Case('', batch=1, how='graph', **_LARGE),
     'ms'),
    ('four images of 1024x1024, images/s', Case('', batch=4, height=1024, width=1024),
     'images_per_s')]


def count(value):
    """All digits, in thousands."""
    return '-' if math.isnan(value) else f'{value:,.0f}'


def tiny_table(rows):
    styles = {'images_per_s': count, 'ms': show, 'peak_gib': show}
    return markdown_table(['224x224, batch 128 unless said', *TINY.values()], [
        [text, *(styles[name](number(rows, case._replace(model=model), name)) for model in TINY)]
        for text, case, name in LINES])


def model_table(rows):
    lines = []
    for model in (*OURS, *PEERS):
        inference, train = Case(model), Case(model, 'forward+backward')
        lines.append([
            PEERS.get(model, f'`{model}`'), count(number(rows, inference, 'images_per_s')),
            count(number(rows, train, 'images_per_s')), show(number(rows, train, 'peak_gib'))])
    return markdown_table(['224x224, batch 128', 'inference, images/s',
                           'forward + backward, images/s', 'its peak memory, GiB'], lines)


def step_table(rows):
    def cell(case):
        ms, peak = (number(rows, case, name) for name in ('ms', 'peak_gib'))
        return '-' if math.isnan(ms) else f'{show(ms)} ms, {show(peak)} GiB'

    return markdown_table(['a training step, its peak memory', *TINY.values()], [
        [steps.Case('', task, precision).what,
         *(cell(steps.Case(model, task, precision)) for model in TINY)]
        for task in ('mask-rcnn', 'upernet') for precision in ('fp32', 'fp16')])


def write(path, texts):
    """Replace what stands between the marks of the places that the file has."""
    content = path.read_text(encoding='utf-8')
    has_place = False
    for place, text in texts.items():
        begin, end = f'<!-- {place} -->\n', f'<!-- /{place} -->\n'
        head, begun, remaining = content.partition(begin)
        _, ended, tail = remaining.partition(end)
        if begun and ended:
            content, has_place = ''.join([head, begin, text, end, tail]), True
    if not has_place:
        raise UserError(f'{path} has no lines ' + ' or '.join(
            f'<!-- {place} --> and <!-- /{place} -->' for place in texts))
    write_atomic(content.encode(), path)


def main():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--models', nargs='+', required=True, metavar='CSV',
                        help='of end_to_end.py')
    parser.add_argument('--steps', nargs='+', default=[], metavar='CSV', help='of dense_steps.py')
    parser.add_argument('--readme', nargs='+', type=Path, metavar='FILE',
                        default=[Path('README.md'), Path('docs/performance.md')],
                        help='where to write them (default: README.md docs/performance.md)')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    rows, step_rows = {}, {}
    for path in args.models:
        rows |= report.SHEET.read(path)
    for path in args.steps:
        step_rows |= steps.SHEET.read(path)
    setting = report.SHEET.find_setting(rows)
    find_setting({**rows, **step_rows}, ('device', 'torch', 'shrink'))
    dtype = {'float16': 'fp16', 'bfloat16': 'bf16'}.get(setting['dtype'], setting['dtype'])
    tables = [f'{setting["device"]}, torch {setting["torch"]}, timm {setting["timm"]}, {dtype} '
              f'autocast and eager unless said.\n', tiny_table(rows), model_table(rows)]
    if step_rows:
        tables.append(step_table(step_rows))
    for path in args.readme:
        write(path, {ALL: '\n'.join(['', *tables, '']), FIRST: '\n'.join(['', *tables[:2], ''])})
        print(f'wrote the tables of {path}')


if __name__ == '__main__':
    cli.run(main)
