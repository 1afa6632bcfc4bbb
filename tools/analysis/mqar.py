"""Multi-query associative recall of softmax attention, Mamba, Mamba-2, RetNet and RWKV.

An example shows key-value pairs and then asks for the values of the keys. How many pairs a model
can look up, by its width and the size of its state, is the study of Zoology (arXiv 2312.04927) and
of Mamba-2 (arXiv 2405.21060, section 9.1 and figure 8). All models are the same language model but
for their mixer, and see the same examples in the same order; each learning rate is a run, and the
best one counts.

--setting gpu is that study, shortened to some 20 minutes of an H200: 256 tokens, 1 to 64 pairs,
8192 tokens in the vocabulary. --setting cpu is a small task of a minute on one core, which tells
Mamba-2 with 16 and with 64 numbers of state apart.

A run that is interrupted, by --minutes or in any other way, goes on where it was when the same
command is called again. Files are FOLDER/runs/RUN.json of each finished run and RUN.pt of one that
is not; mqar.csv, .json and .png are of all finished ones. Calls with different --models or --widths
may share a FOLDER, at the same time too.
"""

import time
from pathlib import Path

import mqar_report as report
from mqar_data import make_segments
from mqar_models import CHOICES, DATA_SEED, MODELS, SETTINGS, Clock, cost_of, guess_seconds
from mqar_training import Run, check_setting, count_steps, read_result, train
from report_parts import check_options, number, print_table

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/analysis/mqar.py --setting cpu
  python tools/analysis/mqar.py --setting gpu --plan
  python tools/analysis/mqar.py --setting gpu --minutes 8
  python tools/analysis/mqar.py --results work_dirs/mqar --report docs/analyses/mqar.md"""

DTYPES = ('fp32', 'tf32', 'bf16')
#: Options that change a setting, and their kinds.
CHANGES = dict(vocab_size=int, length=int, pairs=[int], examples=int, test_examples=int,
               epochs=int, batch_size=int, depth=int, head_dim=int, evaluations=int)
SAY_EVERY = 2  # seconds


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--setting', choices=SETTINGS, help='(default: gpu on a GPU, else cpu)')
    parser.add_argument('--models', nargs='+', choices=MODELS, metavar='NAME',
                        help=f'of {", ".join(MODELS)}')
    parser.add_argument('--widths', type=int, nargs='+', metavar='C', help='values of d_model')
    parser.add_argument('--lrs', type=float, nargs='+', metavar='LR', help='learning rates')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N',
                        help='each decides the initial weights and the data')
    parser.add_argument('--dtype', choices=DTYPES,
                        help='tf32 is fp32 whose products a GPU may round; bf16 is autocast')
    parser.add_argument('--filler', choices=('random', 'zeros'),
                        help='tokens between the queries: any tokens, or 0, which is easier')
    for name, kind in CHANGES.items():
        several = dict(nargs='+', type=kind[0]) if isinstance(kind, list) else dict(type=kind)
        parser.add_argument(f'--{name.replace("_", "-")}', metavar='N', **several,
                            help='in place of the setting\'s')
    parser.add_argument('--cuda-graphs', action='store_true',
                        help='replay each step as a CUDA graph: such small models otherwise wait '
                        'for Python')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='end after so long, at the next evaluation; the same command goes on')
    parser.add_argument('--plan', action='store_true',
                        help='train nothing: what the runs cost, and a guess of their time')
    parser.add_argument('--results', type=Path, metavar='FOLDER',
                        help='train nothing: table, picture and --report of what is finished there')
    cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/mqar'), metavar='FOLDER',
                        help='(default: work_dirs/mqar)')
    parser.add_argument('--report', type=Path, metavar='FILE.md',
                        help='write a report there too, and the picture beside it')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    check_options(args, *CHANGES, 'widths', 'lrs', 'minutes')
    return args


def make_setting(args, on_gpu):
    """(what is the same for all runs, the runs)."""
    name = args.setting or ('gpu' if on_gpu else 'cpu')
    setting = dict(SETTINGS[name], name=name, cuda_graphs=args.cuda_graphs)
    setting['changed'] = {key: getattr(args, key) for key in (*CHANGES, 'dtype', 'filler')
                          if getattr(args, key) not in (None, setting[key])}
    setting |= setting['changed']
    choices = [list(dict.fromkeys(getattr(args, key) or setting[key])) for key in CHOICES]
    for key in CHOICES:
        del setting[key]
    setting['pairs'] = sorted(set(setting['pairs']))
    if setting['length'] % 2 or setting['length'] >= setting['vocab_size']:
        raise UserError(f'--length must be even and less than --vocab-size '
                        f'({setting["vocab_size"]}), not {setting["length"]}')
    if 4 * max(setting['pairs']) > setting['length']:
        raise UserError(f'--pairs: {max(setting["pairs"])} pairs and their queries do not fit into '
                        f'--length {setting["length"]}; it must be at least four times as much')
    if setting['examples'] < setting['batch_size']:
        raise UserError(f'--examples {setting["examples"]} are less than one batch: choose a '
                        '--batch-size of at most that')
    if not on_gpu and (setting['dtype'] == 'tf32' or setting['cuda_graphs']):
        what = '--cuda-graphs' if setting['cuda_graphs'] else 'the dtype tf32'
        raise UserError(f'{what} needs a GPU; on a CPU choose --dtype fp32 and no --cuda-graphs')
    models, widths, lrs, seeds = choices
    return setting, [Run(model, width, lr, seed) for seed in seeds for width in widths
                     for model in models for lr in lrs]


def show_plan(runs, setting, costs, device_type):
    steps = count_steps(setting)
    lines = [('model', 'd_model', 'parameters', 'numbers kept', 'GFLOPs of a step', 'steps', 'runs',
              'seconds of a run, guessed')]
    total = 0
    for (model, width), cost in costs.items():
        count = sum((run.model, run.d_model) == (model, width) for run in runs)
        seconds = steps * guess_seconds(cost, device_type)
        total += count * seconds
        lines.append((MODELS[model].label, str(width), f'{cost.parameters:,}', f'{cost.state:,}',
                      number(cost.flops / 1e9), f'{steps:,}', str(count), number(seconds)))
    print_table(lines)
    print(f'{len(runs)} runs, at most {duration(total)} if the guess is right (a multiply-add is 1 '
          'FLOP); what is solved ends earlier')


def duration(seconds):
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'


class Progress:
    """Lines that tell which run is at work, how many are done, and how long the rest may take."""

    def __init__(self, runs, done, steps, clock):
        self.left = [run for run in runs if run not in done]
        self.total, self.steps, self.clock, self.said = len(runs), steps, clock, 0.0

    def seconds_left(self, training=None):
        """At most: a run that is solved ends earlier."""
        rest = sum(self.steps * self.clock.step_seconds(run) for run in self.left
                   if training is None or run != training.run)
        if training is not None and not training.is_done:
            rest += (self.steps - training.step) * self.clock.step_seconds(training.run)
        return rest

    def __call__(self, training):
        run, now = training.run, time.perf_counter()
        self.clock.measure(run, training.seconds, training.step)
        if now - self.said < SAY_EVERY and not training.is_done:
            return
        self.said, row = now, training.rows[-1]
        loss = 'not finite' if row['loss'] is None else f'{row["loss"]:.3f}'
        done = self.total - len(self.left)
        print(f'[{done} of {self.total} done] {run}: step {training.step} of {training.steps}, '
              f'loss {loss}, accuracy {row["accuracy"]:.3f}; at most '
              f'{duration(self.seconds_left(training))} left', flush=True)


def study(args, start):
    """Train what is not finished; whether all is."""
    import platform

    import torch

    import vmamba_mm
    from vmamba_mm.mm.measuring import cpu_name

    device = torch.device(cli.choose_device(args.device))
    on_gpu = device.type == 'cuda'
    setting, runs = make_setting(args, on_gpu or args.plan)
    costs = {key: cost_of(*key, setting) for key in
             dict.fromkeys((run.model, run.d_model) for run in runs)}
    show_plan(runs, setting, costs, 'cuda' if setting['name'] == 'gpu' else device.type)
    if args.plan:
        return False
    if on_gpu:
        torch.cuda.set_device(device.index or 0)
    torch.set_float32_matmul_precision('high' if setting['dtype'] == 'tf32' else 'highest')
    environment = dict(
        device=torch.cuda.get_device_name(device) if on_gpu else
        f'{cpu_name()}, {torch.get_num_threads()} thread'
        f'{"s" if torch.get_num_threads() > 1 else ""}',
        torch=torch.__version__, vmamba_mm=vmamba_mm.__version__, python=platform.python_version())
    folder, done, clock = args.out / 'runs', set(), Clock(costs, device.type)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        path = folder / f'{run.name}.json'
        if path.exists():
            result = read_result(path)
            check_setting(result['setting'], setting, path)
            clock.measure(run, result['seconds'], result['steps'])
            done.add(run)
    progress = Progress(runs, done, count_steps(setting), clock)
    print(f'{len(done)} of {len(runs)} runs are finished; at most '
          f'{duration(progress.seconds_left())} left', flush=True)
    end = start + 60 * args.minutes if args.minutes else float('inf')
    seed, data = None, None
    for run in list(progress.left):
        if data and time.perf_counter() > end:  # each call gets on, however short it is
            break
        if seed != run.seed:
            seed = run.seed
            data = [[segment.to(device) for segment in split]
                    for split in make_segments(setting, DATA_SEED + seed)]
        cost = costs[run.model, run.d_model]
        if not train(run, data, setting, folder, dict(environment=environment, state=cost.state),
                     progress, lambda: time.perf_counter() > end):
            break
        progress.left.remove(run)
    if progress.left:
        print(f'--minutes {args.minutes:g} are over: {len(runs) - len(progress.left)} of '
              f'{len(runs)} runs are finished, at most {duration(progress.seconds_left())} left; '
              'the same command goes on')
    return not progress.left


def main():
    start = time.perf_counter()
    args = parse_args()
    folder = args.results or args.out
    if not args.results:
        study(args, start)
        if args.plan or not list((folder / 'runs').glob('*.json')):
            return
    results = report.read(folder)
    report.write(results, folder)
    report.show(results)
    report.draw(results, folder / 'mqar.png')
    print(f'wrote {folder}/mqar.csv, .json and .png')
    if args.report:
        report.write_report(results, args.report)
        print(f'wrote {args.report} and {args.report.with_suffix(".png")}')


if __name__ == '__main__':
    cli.run(main)
