"""Write the tables of README.md and docs/performance.md from what end_to_end.py, vim_sizes.py and
dense_steps.py measured.

What stands between the lines "<!-- speed -->" and "<!-- /speed -->" is replaced by the first table
of VMamba, between "<!-- performance -->" and "<!-- /performance -->" by all of them, and between
"<!-- vim -->" and "<!-- /vim -->" by those of Vim. Tables without a row stay as they are. The rows
of all CSV files must be of one device and torch.
"""

import math
from pathlib import Path

import dense_steps_report as steps
import end_to_end_report as report
import vim_sizes as sizes
from bench_report import find_setting, markdown_table, number, show
from end_to_end_report import FAMILIES, VIM_FAMILIES, VMAMBAS, Case
from vim_models import VIMS

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = '''  python tools/bench/readme_table.py --models a.csv b.csv --steps steps.csv
  python tools/bench/readme_table.py --models vim.csv sizes.csv --readme docs/performance.md'''
ALL, FIRST, OF_VIM = 'performance', 'speed', 'vim'  # the places in a file
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
    for model in (*VMAMBAS, *PEERS):
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


def vim_table(rows):
    names = {f'vim_{size}': f'Vim-{size[0].upper()}' for size in ('tiny', 'small', 'base')}
    names |= {peer: f'{names[f"vim_{size}"].replace("Vim", "DeiT")}' for size, peer
              in VIM_FAMILIES['DeiT'].items()}
    names |= {peer: f'{names[f"vim_{size}"]}, {family}' for family in VIM_FAMILIES
              if family.startswith('as published')
              for size, peer in VIM_FAMILIES[family].items()}
    cases = [Case('', task, how, precision) for precision in ('autocast', 'pure')
             for how in ('eager', 'compiled') for task in ('inference', 'forward+backward')]
    cases = [case for case in cases if any(case._replace(model=name) in rows for name in names)]
    heads = [f'{case.task}, {case.precision}' + (', compiled' if case.how == 'compiled' else '')
             for case in cases]
    return markdown_table(
        ['224x224, batch 128, images/s', *heads, 'peak memory of forward + backward, GiB'],
        [[text, *(count(number(rows, case._replace(model=name), 'images_per_s'))
                  for case in cases), show(number(rows, _TRAIN._replace(model=name), 'peak_gib'))]
         for name, text in names.items()])


def sizes_table(rows):
    """Images/s and GiB of inference by the side of the image; '' without the largest sizes."""
    sides = [side for side in sizes.SIDES if sizes.case_of('vim_tiny', 'inference', side) in rows
             or sizes.case_of('vim_small', 'inference', side) in rows]
    if len(sides) < 2:
        return ''
    lines = []
    for model, (text, *_) in sizes.MODELS.items():
        cells = []
        for side in sides:
            case = sizes.case_of(model, 'inference', side)
            cells.append('-' if math.isnan(number(rows, case, 'ms')) else
                         f'{count(number(rows, case, "images_per_s"))}, '
                         f'{show(number(rows, case, "peak_gib"))} GiB')
        lines.append([text, *cells])
    return markdown_table(['inference, images/s, peak memory', *(f'{s}x{s}' for s in sides)], lines)


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
                        help='of end_to_end.py and vim_sizes.py')
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
    title = (f'{setting["device"]}, torch {setting["torch"]}, timm {setting["timm"]}, {dtype} '
             'autocast and eager unless said.\n')
    texts, of_vim = {}, {case for case in rows if case.model in VIMS}
    if step_rows or any(case.model in VMAMBAS for case in rows):
        tables = [title, tiny_table(rows), model_table(rows)]
        if step_rows:
            tables.append(step_table(step_rows))
        texts = {ALL: '\n'.join(['', *tables, '']), FIRST: '\n'.join(['', *tables[:2], ''])}
    if of_vim:
        texts[OF_VIM] = '\n'.join(['', *filter(None, (title, vim_table(rows), sizes_table(rows))),
                                   ''])
    for path in args.readme:
        write(path, texts)
        print(f'wrote the tables of {path}')


if __name__ == '__main__':
    cli.run(main)
