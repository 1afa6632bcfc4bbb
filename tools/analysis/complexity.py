"""How time and memory of sequence models grow with the length: attention, Mamba, Mamba-2.

All models are the same small language model but for their mixer. For each length the tool measures

training   time and peak memory of one forward and backward pass
a token    time of one more token after so many, and the memory that a model keeps of these: the
           size of its state, and on a GPU also the peak of that call

and fits a power of the length to the upper half of the lengths: the slope of a least-squares line
through the logarithms of all repeats, with its standard error. Short lengths do not count, because
what does not depend on the length hides the growth there.

Memory of training is what a call adds to weights and tokens. On a GPU it is what PyTorch has
allocated; on a CPU the rise of the process's resident set, which repeats to some 20 % (Linux only,
else left out).
"""

import gc
import time
from pathlib import Path

import complexity_report as report
from mixers import MIXERS, build, state_after, tensors_of
from report_parts import check_options

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, measuring

EXAMPLES = """\
  python tools/analysis/complexity.py --device cpu
  python tools/analysis/complexity.py --dtype bf16 --report docs/analyses/complexity.md
  python tools/analysis/complexity.py --lengths 256 512 1024 2048 --mixers mamba2 attention"""

LENGTHS = {'gpu': [1024, 2048, 4096, 8192, 16384, 32768, 65536],
           'cpu': [128, 256, 512, 1024, 2048, 4096]}
DTYPES = ('fp32', 'bf16')
SPEND = 200  # ms of calls for one number


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--mixers', nargs='+', choices=MIXERS, default=list(MIXERS),
                        metavar='NAME', help=f'of {", ".join(MIXERS)} (default: all)')
    parser.add_argument('--lengths', type=int, nargs='+', metavar='L',
                        help='in tokens (default: '
                        f'{LENGTHS["gpu"][0]} to {LENGTHS["gpu"][-1]} on a GPU, else '
                        f'{LENGTHS["cpu"][0]} to {LENGTHS["cpu"][-1]}, each twice the one before)')
    parser.add_argument('--embed-dims', type=int, default=256, metavar='C', help='(default: 256)')
    parser.add_argument('--depth', type=int, default=2, metavar='N', help='(default: 2)')
    parser.add_argument('--vocab-size', type=int, default=256, metavar='V',
                        help='small, since the head is the same for all (default: 256)')
    parser.add_argument('--batch-size', type=int, default=1, metavar='B', help='(default: 1)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N',
                        help='measurements of each number (default: 3)')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32',
                        help='bf16: autocast (default: fp32)')
    parser.add_argument('--max-seconds', type=float, default=5, metavar='S',
                        help='a mixer with a slower step gets no longer sequences (default: 5)')
    parser.add_argument('--results', type=Path, metavar='FOLDER',
                        help='measure nothing: table, picture and --report of what is there')
    cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/complexity'),
                        metavar='FOLDER', help='for complexity.csv, .json and .png (default: '
                        'work_dirs/complexity)')
    parser.add_argument('--report', type=Path, metavar='FILE.md',
                        help='write a report there too, and the picture beside it')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    check_options(args, 'lengths', 'embed_dims', 'depth', 'vocab_size', 'batch_size', 'repeats',
                  'max_seconds')
    args.mixers = list(dict.fromkeys(args.mixers))
    return args


class Meter:
    """The measurements of one model.

    Args:
        model: on its device.
        args: of the command line, with ``on_gpu``.
    """

    def __init__(self, model, args):
        import torch

        self.model, self.args = model, args
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16,
                                       enabled=args.dtype == 'bf16')

    def training(self, length):
        """dict(train_ms, train_mib) of a forward and backward pass."""
        import torch
        import torch.nn.functional as F

        tokens = torch.randint(self.args.vocab_size, (self.args.batch_size, length + 1),
                               generator=torch.Generator().manual_seed(0)).to(self.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

        def step():
            self.model.zero_grad()
            with self.autocast:
                logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets)
            loss.backward()
            return loss

        if not step().isfinite():
            raise UserError(f'the loss at length {length} is not finite: not timed')
        ms = measuring.median(step, self.args.on_gpu, SPEND)
        self.model.zero_grad()
        memory = measuring.held_and_peak(step, self.args.on_gpu)
        return dict(train_ms=ms, train_mib=memory and (memory[1] - memory[0]) / 2**20)

    def token(self, length):
        """dict(token_ms, state_bytes, token_mib) of one more token after ``length``."""
        import torch

        with self.autocast:
            state = state_after(self.model, length, self.args.batch_size)
        token = torch.zeros(self.args.batch_size, 1, dtype=torch.long, device=self.device)

        def step():
            with torch.inference_mode(), self.autocast:
                return self.model(token, state)

        if not step()[0].isfinite().all():
            raise UserError(f'the logits after {length} tokens are not finite: not timed')
        ms, mib = measuring.median(step, self.args.on_gpu, SPEND), None
        size = sum(t.nbytes for t in tensors_of(state))
        if self.args.on_gpu:  # on a CPU a rise as small as this one is not seen
            held, peak = measuring.held_and_peak(step, True)
            mib = (peak - held + size) / 2**20
        return dict(token_ms=ms, state_bytes=size, token_mib=mib)


def measure_all(args, setting, device):
    """The rows of all mixers, lengths and repeats, which are written as they come."""
    import torch

    rows, total, start = [], len(args.mixers) * len(args.lengths), time.perf_counter()
    done = 0
    for name in args.mixers:
        torch.manual_seed(0)
        meter, problem = None, ''
        for length in args.lengths:
            done += 1
            if problem:
                rows.append(dict(report.EMPTY, mixer=name, length=length, problem=problem))
                continue
            try:
                meter = meter or Meter(build(
                    name, vocab_size=args.vocab_size, embed_dims=args.embed_dims,
                    depth=args.depth).to(device), args)
                new = [dict(report.EMPTY, mixer=name, length=length, repeat=repeat,
                            **meter.training(length), **meter.token(length))
                       for repeat in range(args.repeats)]
                if max(row['train_ms'] for row in new) > 1e3 * args.max_seconds:
                    problem = f'a step at length {length} takes over {args.max_seconds:g} s'
            except torch.OutOfMemoryError:
                problem = f'the GPU memory is used up at length {length}'
                new = [dict(report.EMPTY, mixer=name, length=length, problem=problem)]
            rows += new
            spent = time.perf_counter() - start
            print(f'[{done} of {total}] {report.describe(new)}; {spent:.0f} s so far', flush=True)
            report.write(rows, setting, args.out)
            gc.collect()
            if args.on_gpu:
                torch.cuda.empty_cache()
    report.write(rows, setting, args.out)
    return rows


def command_of(args):
    words = ['python tools/analysis/complexity.py', f'--mixers {" ".join(args.mixers)}',
             f'--lengths {" ".join(map(str, args.lengths))}']
    for name in ('embed_dims', 'depth', 'vocab_size', 'batch_size', 'repeats', 'dtype'):
        words.append(f'--{name.replace("_", "-")} {getattr(args, name)}')
    return ' '.join(words)


def main():
    args = parse_args()
    if args.results:
        rows, setting = report.read(args.results)
    else:
        import platform

        import torch

        import vmamba_mm

        device = torch.device(cli.choose_device(args.device))
        args.on_gpu = device.type == 'cuda'
        args.lengths = sorted(set(args.lengths or LENGTHS['gpu' if args.on_gpu else 'cpu']))
        if args.on_gpu:
            torch.cuda.set_device(device.index or 0)
        threads = torch.get_num_threads()
        setting = dict(
            command=command_of(args), dtype=args.dtype, embed_dims=args.embed_dims,
            depth=args.depth, vocab_size=args.vocab_size, batch_size=args.batch_size,
            repeats=args.repeats,
            device=torch.cuda.get_device_name(device) if args.on_gpu else
            f'{measuring.cpu_name()}, {threads} thread{"s" if threads > 1 else ""}',
            torch=torch.__version__, vmamba_mm=vmamba_mm.__version__,
            python=platform.python_version())
        args.out.mkdir(parents=True, exist_ok=True)
        rows = measure_all(args, setting, device)
    folder = args.results or args.out
    report.show(rows)
    report.draw(rows, setting, folder / 'complexity.png')
    print(f'wrote {folder}/complexity.png' + ('' if args.results else ', .csv and .json'))
    if args.report:
        report.write_report(rows, setting, args.report)
        print(f'wrote {args.report} and {args.report.with_suffix(".png")}')


if __name__ == '__main__':
    cli.run(main)
