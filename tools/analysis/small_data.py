"""VMamba's scans and Swin of equal parameters, trained from scratch on a small set of images.

All models get the same images in the same order, with the same augmentation, optimiser, schedule
and number of epochs; a seed decides initialisation, order and augmentation alike for all of them.
Reported is the top-1 accuracy on val at the last epoch, never the best one, for each model its
mean, standard deviation and range over the seeds. The models are small: the published architecture
tiny_s1l8 at --embed-dims and --depths, and timm's Swin with the same two, whose mlp_ratio is set
to the quarter that brings its parameters nearest to VMamba's; 2 % is the most they may differ.

The recipe is the published one where a small set allows it: AdamW, weight decay 0.05 but for
biases and 1-D parameters (and Swin's position biases), a linear warm-up and a cosine, gradients
clipped at norm 5, label smoothing 0.1, stochastic depth 0.1, fp16 autocast. Images are decoded
once and stay on the device, where crops, flips and colours are batched; so a GPU does not wait
for a CPU that reads files.
"""

import gc
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOOLS), str(TOOLS / 'bench')]
import _cli  # noqa: E402  (sibling scripts, not a package)
import small_data_report as report  # noqa: E402
from _cli import UserError  # noqa: E402
from _images import list_images  # noqa: E402

EXAMPLES = """\
  python tools/analysis/small_data.py --data data/flowers --minutes 3
  python tools/analysis/small_data.py --data data/flowers --epochs 100 --size 128 --cuda-graphs
  python tools/analysis/small_data.py --data data/demo/imagenet --size 32 --embed-dims 16 \\
      --depths 1 1 1 1 --epochs 2 --batch-size 64 --seeds 0 --device cpu
  python tools/analysis/small_data.py --results work_dirs/small_data --report docs/small_data.md"""

SCANS = ('cross', 'unidirectional', 'bidirectional', 'cascade')
MODELS = tuple(f'vmamba-{scan}' for scan in SCANS) + ('swin',)
RECIPE = dict(weight_decay=0.05, warm_up=0.1, final_lr=0.01, max_norm=5.0, label_smoothing=0.1,
              drop_path_rate=0.1, crop_area=(0.25, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5,
              colour=0.3)
MOST_DIFFERENCE = 0.02  # of parameters
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SETTINGS = ('seeds', 'size', 'batch_size', 'lr', 'embed_dims', 'depths', 'conv_kernel', 'dtype',
            'cuda_graphs')  # options that are kept as they are
MARGIN = 0.9  # of what is left of --minutes: speed varies


def parse_args():
    parser = _cli.make_parser(__doc__, EXAMPLES)
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
    parser.add_argument('--conv-kernel', type=int, choices=(0, 3), default=3,
                        help="size of SS2D's depthwise convolution; 0 for none, so that the scans "
                        'matter more (default: 3)')
    parser.add_argument('--dtype', choices=('fp16', 'fp32'),
                        help='fp16 is autocast, on a GPU (default: fp16 on a GPU, else fp32)')
    parser.add_argument('--cuda-graphs', action='store_true',
                        help='replay forward and backward as CUDA graphs: such small models '
                        'otherwise wait for Python')
    _cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/small_data'),
                        metavar='FOLDER', help='for small_data.csv, .json and .png (default: '
                        'work_dirs/small_data)')
    parser.add_argument('--report', type=Path, metavar='FILE.md',
                        help='write a report there too, and the picture beside it')
    parser.add_argument('--traceback', action='store_true', help=_cli.argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ('epochs', 'size', 'batch_size', 'lr', 'embed_dims', 'minutes'):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f'--{name.replace("_", "-")} must be above 0, not {value}')
    for name, step in (('size', 32), ('embed_dims', 12)):
        if getattr(args, name) % step:
            raise UserError(f'--{name.replace("_", "-")} must be a multiple of {step}, not '
                            f'{getattr(args, name)}')
    if min(args.depths) < 1:
        raise UserError(f'--depths takes four numbers of at least 1, not {args.depths}')
    args.models, args.seeds = (list(dict.fromkeys(v)) for v in (args.models, args.seeds))
    if args.report and args.report.suffix != '.md':
        raise UserError(f'--report takes the name of a Markdown file (.md), not {args.report}')
    return args


# --- data -----------------------------------------------------------------------------------

@dataclass
class Split:
    """Images as (N, 3, S, S) uint8, RGB, and their classes as (N,) int64, on the device."""

    images: 'torch.Tensor'  # noqa: F821
    labels: 'torch.Tensor'  # noqa: F821

    def __len__(self):
        return len(self.labels)


def find_classes(folder):
    """Class -> image files of a folder of class folders.

    Raises:
        UserError: if there is no such folder, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f'the folder {folder} does not exist: --data takes a folder with train/ '
                        'and val/, both with a folder for each class')
    found = {p.name: list_images([p]) for p in sorted(folder.iterdir())
             if p.is_dir() and not p.name.startswith('.')}
    if len(found) < 2:
        raise UserError(f'{folder} has {len(found)} class folder(s); at least 2 are needed')
    return found


def read_image(path, side):
    """(3, side, side) uint8 RGB: the shorter side resized by bicubic, its centre cropped."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert('RGB'), (side, side), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError) as err:
        raise UserError(f'{path} is corrupt, or no image') from err
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load(root, size, device):
    """The splits by name, and the classes. Images are kept 8/7 times as large as the models see
    them, which is ImageNet's 256 to 224."""
    import torch
    from mmengine.utils import track_iter_progress

    found = {split: find_classes(root / split) for split in ('train', 'val')}
    if list(found['train']) != list(found['val']):
        differing = sorted(set(found['train']) ^ set(found['val']))
        raise UserError(f'train/ and val/ of {root} must have the same classes; only one of them '
                        f'has {", ".join(differing)}')
    splits = {}
    for split, classes in found.items():
        files = [(path, c) for c, paths in enumerate(classes.values()) for path in paths]
        print(f'reading {split}')
        images = [read_image(path, round(size * 8 / 7)) for path, _ in track_iter_progress(files)]
        print(flush=True)  # ends the line of the progress bar
        splits[split] = Split(torch.stack(images).to(device),
                              torch.tensor([c for _, c in files]).to(device))
    return splits, list(found['train'])


def normalise(images):
    """uint8 or float of 0 to 255 to fp32 of about mean 0 and deviation 1."""
    import torch

    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() - mean) / std


def augment(images, size, generator):
    """Random resized crops, flips, and brightness, contrast and saturation, for a batch at once.

    Args:
        images: (B, 3, S, S) uint8.
        size: side of the crops.
        generator: on the same device; all draws come from it.

    Returns:
        (B, 3, size, size) fp32, normalised.
    """
    import torch
    import torch.nn.functional as F

    count, device = len(images), images.device

    def uniform(low, high):
        return torch.empty(count, device=device).uniform_(low, high, generator=generator)

    area = uniform(*RECIPE['crop_area'])
    ratio = uniform(*(math.log(r) for r in RECIPE['crop_ratio'])).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = 1 - 2 * (uniform(0, 1) < RECIPE['flip']).float()
    theta = torch.zeros(count, 2, 3, device=device)  # the image is -1 to 1
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, (1 - width) * uniform(-1, 1)
    theta[:, 1, 1], theta[:, 1, 2] = height, (1 - height) * uniform(-1, 1)
    grid = F.affine_grid(theta, (count, 3, size, size), align_corners=False)
    x = F.grid_sample(images.float(), grid, padding_mode='border', align_corners=False)
    factors = [uniform(1 - RECIPE['colour'], 1 + RECIPE['colour']).view(-1, 1, 1, 1)
               for _ in range(3)]
    grey = torch.tensor((0.299, 0.587, 0.114), device=device).view(1, 3, 1, 1)
    x = x * factors[0]
    x = torch.lerp((x * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True), x, factors[1])
    x = torch.lerp((x * grey).sum(1, keepdim=True), x, factors[2])
    return normalise(x.clamp(0, 255))


# --- models ---------------------------------------------------------------------------------

def window_of(size):
    """Swin's window: the side of its last, third or second map, whichever is nearest to 7.

    It divides the maps of all stages but a smaller last one, so that nothing is padded; at 224 it
    is 7, as published.
    """
    return min((size // 32 * 2 ** i for i in range(3)), key=lambda w: abs(w - 7))


def build(name, num_classes, args, mlp_ratio=4.0):
    """One of MODELS for (B, 3, size, size), with random weights from torch's generator."""
    from timm.models.swin_transformer import SwinTransformer

    from vmamba_mm.families.vmamba import ARCH_SETTINGS
    from vmamba_mm.timm import TimmVMamba

    rate = RECIPE['drop_path_rate']
    if name == 'swin':
        return SwinTransformer(
            img_size=args.size, window_size=window_of(args.size), embed_dim=args.embed_dims,
            depths=args.depths, num_heads=(3, 6, 12, 24), mlp_ratio=mlp_ratio,
            num_classes=num_classes, drop_path_rate=rate)
    arch = {**ARCH_SETTINGS['tiny_s1l8'], 'embed_dims': args.embed_dims,
            'depths': tuple(args.depths), 'conv_kernel': args.conv_kernel,
            'scan': name.removeprefix('vmamba-')}
    return TimmVMamba(arch, num_classes=num_classes, drop_path_rate=rate)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def match_swin(num_classes, args):
    """Swin's mlp_ratio, in quarters, that brings its parameters nearest to VMamba's."""
    wanted, four, five = (count_parameters(build(name, num_classes, args, ratio)) for name, ratio
                          in ((MODELS[0], None), ('swin', 4), ('swin', 5)))
    return round(4 * (4 + (wanted - four) / (five - four))) / 4


def describe_models(num_classes, args):
    """Model -> what it is: mlp_ratio, parameters, FLOPs of an image (a multiply-add is 1).

    Raises:
        UserError: if the parameters differ by more than 2 %.
    """
    import flops

    found = {}
    for name in args.models:
        ratio = match_swin(num_classes, args) if name == 'swin' else 4.0
        model = build(name, num_classes, args, ratio)
        found[name] = dict(parameters=count_parameters(model), mlp_ratio=ratio,
                           flops=flops.count_module(model, (args.size, args.size)).flops)
    counts = [m['parameters'] for m in found.values()]
    if max(counts) > (1 + MOST_DIFFERENCE) * min(counts):
        raise UserError(f'the models have {min(counts):,} to {max(counts):,} parameters, which is '
                        f'more than {MOST_DIFFERENCE:.0%} apart: choose other --embed-dims or '
                        '--depths')
    return found


# --- training -------------------------------------------------------------------------------

def lr_factor(step, steps):
    """Of the highest learning rate: a linear warm-up, then a cosine down to RECIPE['final_lr']."""
    warm_up = max(1, round(RECIPE['warm_up'] * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - 1 - warm_up)
    low = RECIPE['final_lr']
    return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2


class Training:
    """One model with one seed. Batches depend on the seed alone, whatever the model draws.

    Args:
        name: of MODELS.
        mlp_ratio: as of :func:`describe_models`.
        steps: of the whole training, for the schedule.
    """

    def __init__(self, name, mlp_ratio, seed, splits, num_classes, steps, args):
        import torch
        from timm.optim import param_groups_weight_decay

        self.splits, self.steps, self.args, self.step = splits, steps, args, 0
        device = splits['train'].images.device
        torch.manual_seed(seed)  # built on the CPU: the same weights on every device
        self.model = build(name, num_classes, args, mlp_ratio).to(device).train()
        self.generator = torch.Generator(device).manual_seed(seed)
        groups = param_groups_weight_decay(
            self.model, RECIPE['weight_decay'], no_weight_decay_list=self.model.no_weight_decay())
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        half = args.dtype == 'fp16'
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        # The weights change at every step, so a cache of cast ones gains nothing; graphs forbid it.
        self.autocast = torch.autocast(device.type, torch.float16, enabled=half,
                                       cache_enabled=False)
        if args.cuda_graphs:
            gc.collect()  # graphs of an earlier training, freed during a capture, would end it
            sample = torch.zeros(args.batch_size, 3, args.size, args.size, device=device)
            with self.autocast:
                self.model = torch.cuda.make_graphed_callables(self.model, (sample,))

    def batches(self):
        """Images (B, 3, size, size) and labels (B,) of an epoch; the rest of a batch is dropped."""
        import torch

        train, size = self.splits['train'], self.args.batch_size
        order = torch.randperm(len(train), generator=self.generator,
                               device=self.generator.device)
        for chosen in order[:len(train) // size * size].split(size):
            yield (augment(train.images[chosen], self.args.size, self.generator),
                   train.labels[chosen])

    def train_epoch(self):
        """The mean loss, on the device: nothing waits for it."""
        import torch
        import torch.nn.functional as F

        losses = []
        for images, labels in self.batches():
            for group in self.optimizer.param_groups:
                group['lr'] = self.args.lr * lr_factor(self.step, self.steps)
            with self.autocast:
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels,
                                   label_smoothing=RECIPE['label_smoothing'])
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE['max_norm'])
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def evaluate(self):
        """Top-1 in % on the centres of val."""
        import torch

        val, size = self.splits['val'], self.args.size
        edge = (val.images.shape[-1] - size) // 2
        self.model.eval()
        correct = 0
        with torch.inference_mode(), self.autocast:
            for images, labels in zip(val.images.split(2 * self.args.batch_size),
                                      val.labels.split(2 * self.args.batch_size), strict=True):
                x = normalise(images[:, :, edge:edge + size, edge:edge + size])
                correct = correct + (self.model(x).argmax(1) == labels).sum()
        self.model.train()
        return 100 * correct.item() / len(val)

    def evaluate_without_scan(self):
        """Top-1 in % after B, C and delta's input are set to zero for good; None for Swin.

        The states stay at zero then, and a scan returns its skip D x alone (LayerNorms included
        that are part of the pattern). How far it falls tells how much the model uses its scan.
        """
        scans = [p for name, p in self.model.named_parameters() if name.endswith('x_proj_weight')]
        for weight in scans:
            weight.data.zero_()
        return self.evaluate() if scans else None

    def run_epoch(self):
        """Train and evaluate; a row of the results without its names."""
        start = time.perf_counter()
        loss = self.train_epoch().item()  # waits for the device
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f'the loss is {loss} after {self.step} steps: lower --lr, or train '
                            'with --dtype fp32')
        count = len(self.splits['train']) // self.args.batch_size * self.args.batch_size
        return dict(loss=loss, top1=self.evaluate(), top1_no_scan=None,
                    images_per_s=count / seconds)


def find_epochs(models, splits, num_classes, args, start):
    """The most epochs with which all models and seeds fit into --minutes since ``start``."""
    fixed, total = 0, 0
    for name, model in models.items():
        setting = (name, model['mlp_ratio'], 0, splits, num_classes, 1000, args)
        Training(*setting).run_epoch()  # kernels are compiled and memory is allocated
        begin = time.perf_counter()
        training = Training(*setting)
        built = time.perf_counter()
        training.run_epoch()
        total += (time.perf_counter() - built) * len(args.seeds)
        fixed += (built - begin) * len(args.seeds)
    left = MARGIN * (60 * args.minutes - (time.perf_counter() - start) - fixed)
    if left < total:
        raise UserError(f'--minutes {args.minutes:g} is too short: one epoch of all models and '
                        f'seeds takes {total:.1f} s, and {max(left, 0):.1f} s are left after '
                        'reading, timing and building')
    return int(left / total)


def train_all(models, splits, num_classes, epochs, args):
    """The rows of all models, seeds and epochs."""
    from mmengine.utils import ProgressBar

    rows = []
    steps = epochs * (len(splits['train']) // args.batch_size)
    for seed in args.seeds:
        for name, model in models.items():
            print(f'{name}, seed {seed}')
            bar = ProgressBar(epochs)
            training = Training(name, model['mlp_ratio'], seed, splits, num_classes, steps, args)
            for epoch in range(1, epochs + 1):
                rows.append(dict(model=name, seed=seed, epoch=epoch, **training.run_epoch()))
                bar.update()
            rows[-1]['top1_no_scan'] = training.evaluate_without_scan()
            print(f'\n{name}, seed {seed}: loss {rows[-1]["loss"]:.3f}, top-1 '
                  f'{rows[-1]["top1"]:.1f} %', flush=True)
    return sorted(rows, key=lambda row: args.models.index(row['model']))


# --- the tool -------------------------------------------------------------------------------

def name_of(folder):
    """Of the data: as it was given, or the folder's own, with no path of this machine in it."""
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

    require('timm')
    import timm
    import torch
    from cpu_name import cpu_name

    import vmamba_mm

    device = torch.device(_cli.choose_device(args.device))
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
    _cli.prepare_mm()
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
    _cli.run(main)
