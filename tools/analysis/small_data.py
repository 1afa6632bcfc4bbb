"""VMamba's scans, VMamba with SSD, VSSD and Swin of equal parameters, trained from scratch on a
small set of images.

All models get the same images in the same order, with the same augmentation, optimiser, schedule
and number of epochs; a seed decides initialisation, order and augmentation alike for all of them.
Reported is the top-1 accuracy on val at the last epoch, never the best one, for each model its
mean, standard deviation and range over the seeds. The models are small: the published architecture
tiny_s1l8 at --embed-dims and --depths; and with the same two its variant with SSD in place of S6
(tiny_m2), VSSD's tiny and timm's Swin, whose mlp_ratio is set to the twelfth (of Swin the quarter)
that brings their parameters nearest to those of tiny_s1l8; 2 % is the most any two may differ.

The recipe is the published one where a small set allows it: AdamW, weight decay 0.05 but for
biases and 1-D parameters (and Swin's position biases), a linear warm-up and a cosine, gradients
clipped at norm 5, label smoothing 0.1, stochastic depth 0.1, fp16 autocast. Images are decoded
once and stay on the device, where crops, flips and colours are batched; so a GPU does not wait
for a CPU that reads files.
"""

import time
from pathlib import Path

import small_data_report as report
from report_parts import check_options
from small_data_images import load
from small_data_models import MODELS, describe_models, window_of
from small_data_recipe import RECIPE
from small_data_training import find_epochs, train_all

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.compat import prepare_mm

EXAMPLES = """\
  python tools/analysis/small_data.py --data data/flowers --minutes 3
  python tools/analysis/small_data.py --data data/flowers --epochs 100 --size 128 --cuda-graphs
  python tools/analysis/small_data.py --data data/flowers --minutes 10 --seeds 0 1 2 3 4 \\
      --models vmamba-cross vmamba-ssd vssd swin
  python tools/analysis/small_data.py --data data/demo/imagenet --size 32 --embed-dims 16 \\
      --depths 1 1 1 1 --epochs 2 --batch-size 64 --seeds 0 --device cpu
  python tools/analysis/small_data.py --results work_dirs/small_data \\
      --report docs/analyses/small_data.md"""

SETTINGS = ('seeds', 'size', 'batch_size', 'lr', 'embed_dims', 'depths', 'd_state', 'conv_kernel',
            'dtype', 'cuda_graphs')  # options that are kept as they are


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data', type=Path, metavar='DIR',
                        help='a folder with train/ and val/, both with a folder for each class')
    source.add_argument('--results', type=Path, metavar='FOLDER',
                        help='train nothing: table, picture and --report of a run that is there')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS),
                        metavar='NAME', help=f'of {", ".join(MODELS)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N',
                        help='(default: 0 1 2)')
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--epochs', type=int, default=40, metavar='N', help='(default: 40)')
    length.add_argument('--minutes', type=float, metavar='M',
                        help='instead of --epochs: for the whole run; a short timing finds the '
                        'number of epochs, the same for all models')
    parser.add_argument('--size', type=int, default=96, metavar='PIXELS',
                        help='side of the images, a multiple of 32 (default: 96)')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N', help='(default: 128)')
    parser.add_argument('--lr', type=float, default=1e-3, help='the highest (default: 1e-3)')
    parser.add_argument('--embed-dims', type=int, default=48, metavar='C',
                        help='channels of the first stage, a multiple of 12 (default: 48)')
    parser.add_argument('--depths', type=int, nargs=4, default=[2, 2, 4, 2], metavar='N',
                        help='blocks of the four stages (default: 2 2 4 2)')
    parser.add_argument('--d-state', type=int, default=64, metavar='N',
                        help='size of the state of vmamba-ssd and vssd; that of S6 is 1 '
                        '(default: 64)')
    parser.add_argument('--conv-kernel', type=int, choices=(0, 3), default=3,
                        help="size of VMamba's depthwise convolution; 0 for none, so that the "
                        'scans matter more (default: 3)')
    parser.add_argument('--dtype', choices=('fp16', 'fp32'),
                        help='fp16 is autocast, on a GPU (default: fp16 on a GPU, else fp32)')
    parser.add_argument('--cuda-graphs', action='store_true',
                        help='replay forward and backward as CUDA graphs: such small models '
                        'otherwise wait for Python')
    cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/small_data'),
                        metavar='FOLDER', help='for small_data.csv, .json and .png (default: '
                        'work_dirs/small_data)')
    parser.add_argument('--report', type=Path, metavar='FILE.md',
                        help='write a report there too, and the picture beside it')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    check_options(args, 'epochs', 'size', 'batch_size', 'lr', 'embed_dims', 'd_state', 'minutes')
    for name, step in (('size', 32), ('embed_dims', 12)):
        if getattr(args, name) % step:
            raise UserError(f'--{name.replace("_", "-")} must be a multiple of {step}, not '
                            f'{getattr(args, name)}')
    if min(args.depths) < 1:
        raise UserError(f'--depths takes four numbers of at least 1, not {args.depths}')
    args.models, args.seeds = (list(dict.fromkeys(v)) for v in (args.models, args.seeds))
    return args


def name_of(folder):
    """The name of the data: as it was given, or the folder's own, with no path of this machine."""
    here = not folder.is_absolute() and '..' not in folder.parts
    return folder.as_posix() if here else folder.resolve().name


def command_of(args, epochs):
    """The command that trains the same again, with no path of this machine in it."""
    words = ['python tools/analysis/small_data.py', f'--data {name_of(args.data)}',
             f'--epochs {epochs}']
    for name in SETTINGS[:-1]:
        value = getattr(args, name)
        value = ' '.join(map(str, value)) if isinstance(value, list) else value
        words.append(f'--{name.replace("_", "-")} {value}')
    if args.models != list(MODELS):
        words.append(f'--models {" ".join(args.models)}')
    return ' '.join(words + ['--cuda-graphs'] * args.cuda_graphs)


def study(args):
    """Train everything; the rows, and the setting with what the models are."""
    start = time.perf_counter()
    import platform

    from vmamba_mm.mm.compat import require
    from vmamba_mm.mm.measuring import cpu_name

    require('timm')
    import timm
    import torch

    import vmamba_mm

    device = torch.device(cli.choose_device(args.device))
    on_gpu = device.type == 'cuda'
    args.dtype = args.dtype or ('fp16' if on_gpu else 'fp32')
    if not on_gpu and (args.dtype == 'fp16' or args.cuda_graphs):
        raise UserError(f'{"--cuda-graphs" if args.cuda_graphs else "--dtype fp16"} needs a GPU, '
                        f'and the device is {device}')
    splits, classes = load(args.data, args.size, device)
    if len(splits['train']) < args.batch_size:
        raise UserError(f'{args.data}/train has {len(splits["train"])} images: choose a '
                        '--batch-size of at most that')
    models = describe_models(len(classes), args)
    for name, model in models.items():
        print(f'{name:22}{model["parameters"]:>12,} parameters{model["flops"] / 1e6:>10,.1f} '
              f'MFLOPs, mlp_ratio {model["mlp_ratio"]:g}')
    epochs = args.epochs
    if args.minutes:
        epochs = find_epochs(models, splits, len(classes), args, start)
        print(f'{epochs} epochs fit into {args.minutes:g} minutes')
    rows = train_all(models, splits, len(classes), epochs, args)
    counts = splits['val'].labels.bincount(minlength=len(classes)).tolist()
    return rows, dict(
        command=command_of(args, epochs), data=name_of(args.data), classes=classes,
        train_images=len(splits['train']), val_images=len(splits['val']),
        chance=100 * max(counts) / sum(counts), epochs=epochs,
        steps=epochs * (len(splits['train']) // args.batch_size), window=window_of(args.size),
        recipe=RECIPE, **{name: getattr(args, name) for name in SETTINGS},
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        seconds=round(time.perf_counter() - start, 1), torch=torch.__version__,
        timm=timm.__version__, vmamba_mm=vmamba_mm.__version__,
        python=platform.python_version(), models=models)


def main():
    args = parse_args()
    prepare_mm()
    if args.results:
        rows, setting = report.read(args.results)
    else:
        rows, setting = study(args)
        report.write(rows, setting, args.out)
    summary = report.summarise(rows, setting)
    report.show(summary)
    folder = args.results or args.out
    report.draw(rows, summary, setting, folder / 'small_data.png')
    print(f'wrote {folder}/small_data.png' + ('' if args.results else ', .csv and .json'))
    if args.report:
        report.write_report(rows, summary, setting, args.report)
        print(f'wrote {args.report} and {args.report.with_suffix(".png")}')


if __name__ == '__main__':
    cli.run(main)
