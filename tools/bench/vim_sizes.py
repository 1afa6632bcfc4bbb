"""Vim beside DeiT as images grow: where the lines cross, and what Vim's paper claims at 1248x1248.

Each size has about as many pixels in a batch as 128 images of 224x224, the same batch for all
models. DeiT comes twice: with PyTorch's fused attention, and with the matrices of attention in
memory, which the claim (arXiv 2401.09417: 2.8 times DeiT's speed, 86.8 % less memory) was made
beside. Its memory is what a forward needs at most, weights and images included.

What is timed is checked first, as in end_to_end.py: outputs up to 512x512 against the same model in
fp32 on the CPU, larger ones against that on the GPU with Vim's mixers op by op.
"""

import math

import end_to_end as bench
import end_to_end_report as report
from bench_options import add_run_options, check_run_options
from bench_report import NAN, number, print_table, show
from end_to_end_report import COLOURS, MARKERS, Case, plt

from vmamba_mm.atomic import atomic_file
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = '''  python tools/bench/vim_sizes.py --csv sizes.csv --png sizes.png
  python tools/bench/vim_sizes.py --merge sizes.csv --png sizes.png
  python tools/bench/vim_sizes.py --device cpu --shrink 16 --models vim_tiny deit_t'''
SIDES = (224, 384, 512, 768, 1024, 1248, 1536, 2048)
#: the side of the claim
CLAIMED = 1248
#: model: what it is called, its colour, and how its line is drawn
MODELS = {'vim_tiny': ('Vim-T', COLOURS[0], '-'),
          'deit_t': ('DeiT-T, fused attention', COLOURS[1], '--'),
          'plain_deit_t': ('DeiT-T, attention in memory', COLOURS[1], ':'),
          'vim_small': ('Vim-S', COLOURS[2], '-'),
          'deit_s': ('DeiT-S, fused attention', COLOURS[3], '--'),
          'plain_deit_s': ('DeiT-S, attention in memory', COLOURS[3], ':')}
PEERS = {'vim_tiny': ('deit_t', 'plain_deit_t'), 'vim_small': ('deit_s', 'plain_deit_s')}


def case_of(model, task, side):
    return Case(model, task, batch=max(1, round(128 * (224 / side) ** 2)), height=side, width=side)


def values(rows, model, task, name):
    """{side: number} of what was measured."""
    found = {side: number(rows, case_of(model, task, side), name) for side in SIDES}
    return {side: value for side, value in found.items() if value > 0}


def crossing(ours, theirs):
    """The side from which on ``ours`` is above ``theirs``, both {side: value}, between the measured
    ones by a straight line of logarithms; 0 if it always is, NaN if it is not at the largest."""
    sides = sorted(set(ours) & set(theirs))
    ahead = [math.log(ours[side] / theirs[side]) for side in sides]
    if not sides or ahead[-1] <= 0:
        return NAN
    last = max((i for i, a in enumerate(ahead) if a <= 0), default=None)
    if last is None:
        return 0.0
    part = ahead[last] / (ahead[last] - ahead[last + 1])
    return sides[last] * (sides[last + 1] / sides[last]) ** part


def print_report(rows, task):
    lines, claims, crossings = [], [], []
    for side in SIDES:
        cases = [case_of(model, task, side) for model in MODELS]
        if any(case in rows for case in cases):
            lines.append([f'{side}x{side}, batch {cases[0].batch}', *(
                f'{show(number(rows, case, "images_per_s"))} | '
                f'{show(number(rows, case, "peak_gib"))}' for case in cases)])
    print_table(f'{task}: images/s | peak GiB', ['', *MODELS], lines)
    for vim, peers in PEERS.items():
        for peer in peers:
            ours, theirs = case_of(vim, task, CLAIMED), case_of(peer, task, CLAIMED)
            speed = (number(rows, ours, 'images_per_s') / number(rows, theirs, 'images_per_s'))
            saved = 100 * (1 - number(rows, ours, 'peak_gib') / number(rows, theirs, 'peak_gib'))
            if speed > 0:
                claims.append([f'{MODELS[vim][0]}: {MODELS[peer][0]}', show(speed), show(saved)])
            side = crossing(*(values(rows, model, task, 'images_per_s') for model in (vim, peer)))
            crossings.append([f'{MODELS[vim][0]}: {MODELS[peer][0]}', 'every side' if side == 0
                              else '-' if math.isnan(side) else f'{side:.0f}'])
    print_table(f'{task} at {CLAIMED}x{CLAIMED}; the paper claims 2.8, and 86.8 %',
                ['', 'times as fast', '% of memory saved'], claims)
    print_table(f'{task}: Vim is faster from this side on, in pixels', ['', 'side'], crossings)


def plot(rows, path, title, task):
    """Megapixels a second and peak memory by the side of the image, both axes logarithmic."""
    panels = {'megapixels/s': {
        model: {side: speed * side ** 2 / 1e6 for side, speed in values(
            rows, model, task, 'images_per_s').items()} for model in MODELS}}
    panels['peak memory, GiB'] = {model: values(rows, model, task, 'peak_gib') for model in MODELS}
    panels = {label: lines for label, lines in panels.items() if any(lines.values())}
    if not panels:
        raise UserError(f'there is nothing to draw: {path} was not written')
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(7 * len(panels), 5.2),
                                layout='constrained')
    for ax, (label, lines) in zip(axes.flat, panels.items(), strict=True):
        for marker, (model, line) in zip(MARKERS, lines.items(), strict=True):
            name, colour, style = MODELS[model]
            if line:
                ax.plot(list(line), list(line.values()), color=colour, linestyle=style,
                        marker=marker, label=name)
        ax.set(xscale='log', yscale='log', xlabel='side of the image', ylabel=label)
        ax.set_xticks(SIDES, map(str, SIDES))
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(f'{title}; {task}, as many pixels in a batch as 128 images of 224x224',
                    fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--models', nargs='+', choices=MODELS, metavar='MODEL',
                        help=f'{", ".join(MODELS)} (default: all; none with --merge)')
    parser.add_argument('--sides', nargs='+', type=int, choices=SIDES, default=SIDES,
                        metavar='SIDE', help=f'{", ".join(map(str, SIDES))} (default: all)')
    parser.add_argument('--task', choices=('inference', 'forward+backward'), default='inference')
    parser.add_argument('--dtype', choices=('float16', 'bfloat16'), default='float16')
    parser.add_argument('--png', metavar='FILE', help='draw speed and memory there')
    add_run_options(parser, 'batches and sides by N, to try the tool out where there is no GPU')
    args = parser.parse_args()
    args.models = check_run_options(args, args.models, tuple(MODELS), '--device cpu --shrink 16')
    return args


def main():
    args = parse_args()
    rows, setting, title = bench.begin(args, bool(args.models))
    cases = [case_of(model, args.task, side) for side in args.sides for model in args.models]
    bench.measure_all(cases, args, rows, setting)
    print_report(rows, args.task)
    report.print_rows(rows)
    if args.csv:
        report.SHEET.write(args.csv, rows)
    if args.png:
        plot(rows, args.png, title, args.task)
    bench.fail_if_ours_did(rows)


if __name__ == '__main__':
    cli.run(main)
