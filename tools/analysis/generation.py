"""Generated tokens a second, and what a model keeps of the tokens before, by how many these were.

The language model of Cobra, a Mamba, beside the same model with softmax attention: an image and
text of each length are read, then single tokens follow. Mamba's time and memory of a token should
not depend on the length (the point of arXiv 2403.14520, section 4.3); attention keeps keys and
values of all tokens, and reads them for each new one.
"""

from pathlib import Path

from mixers import MIXERS, build, state_after, tensors_of
from report_parts import check_options, number, print_table, write_csv

from vmamba_mm.mm import cli, measuring

EXAMPLES = """\
  python tools/analysis/generation.py --device cpu
  python tools/analysis/generation.py --embed-dims 2560 --depth 64 --dtype bf16   (Cobra's, a GPU)
  python tools/analysis/generation.py --picture docs/analyses/generation_cpu.png"""

NAMES = ('mamba', 'attention')
COLUMNS = ('mixer', 'length', 'tokens_per_s', 'state_MB')


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--lengths', type=int, nargs='+', metavar='L',
                        default=[1024, 2048, 4096, 8192, 16384, 32768],
                        help='tokens before, those of an image included (default: 1024 to 32768)')
    parser.add_argument('--embed-dims', type=int, default=256, metavar='C', help='(default: 256)')
    parser.add_argument('--depth', type=int, default=4, metavar='N', help='(default: 4)')
    parser.add_argument('--head-dim', type=int, default=64, metavar='P',
                        help='of the attention (default: 64)')
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32', help='(default: fp32)')
    parser.add_argument('--repeats', type=int, default=3, metavar='N',
                        help='of which the fastest counts (default: 3)')
    cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/generation'), metavar='FOLDER',
                        help='for generation.csv and .png (default: work_dirs/generation)')
    parser.add_argument('--picture', type=Path, metavar='FILE.png', help='another place of it')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    args.report = None
    check_options(args, 'lengths', 'embed_dims', 'depth', 'head_dim', 'repeats')
    return args


def measure(name, args, device):
    """Rows of a mixer."""
    import torch

    more = dict(num_heads=max(args.embed_dims // args.head_dim, 1)) if name == 'attention' else {}
    torch.manual_seed(0)
    model = build(name, vocab_size=256, embed_dims=args.embed_dims, depth=args.depth, **more)
    model = model.to(device, torch.bfloat16 if args.dtype == 'bf16' else torch.float32).eval()
    on_gpu, token, rows = device != 'cpu', torch.zeros(1, 1, dtype=torch.long, device=device), []
    for length in args.lengths:
        state = state_after(model, length)
        with torch.no_grad():
            ms = min(measuring.median(lambda s=state: model(token, s, 1), on_gpu, spend=300)
                     for _ in range(args.repeats))
        held = sum(t.numel() * t.element_size() for t in tensors_of(state))
        rows.append(dict(mixer=name, length=length, tokens_per_s=1e3 / ms, state_MB=held / 1e6))
        print(f'{name}, {length} tokens: {1e3 / ms:.0f} tokens/s, {held / 1e6:.2f} MB', flush=True)
    return rows


def draw(rows, title, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, key, label in zip(figure.subplots(1, 2), COLUMNS[2:], (
            'generated tokens a second', 'MB that the model keeps'), strict=True):
        for name in NAMES:
            own = [row for row in rows if row['mixer'] == name]
            axes.plot([row['length'] for row in own], [row[key] for row in own], marker='o',
                      label=MIXERS[name].label)
        axes.set(xscale='log', xlabel='tokens before', ylabel=label)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log' if key == 'state_MB' else 'linear')
        if key != 'state_MB':
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    device = cli.choose_device(args.device)
    import torch

    where = torch.cuda.get_device_name() if device != 'cpu' else measuring.cpu_name()
    title = (f'{args.depth} layers of {args.embed_dims} channels, batch 1, {args.dtype}, {where}, '
             f'torch {torch.__version__}')
    print(title)
    rows = [row for name in NAMES for row in measure(name, args, device)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, COLUMNS, args.out / 'generation.csv')
    for path in (args.out / 'generation.png', args.picture):
        if path is not None:
            draw(rows, title, path)
    print_table([('mixer', 'tokens before', 'tokens/s', 'MB kept'), *(
        (MIXERS[row['mixer']].label, number(row['length'], 6), number(row['tokens_per_s'], 6),
         number(row['state_MB'])) for row in rows)])
    print(f'{args.out / "generation.csv"} and .png')


if __name__ == '__main__':
    cli.run(main)
