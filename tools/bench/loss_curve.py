"""Train a small VMamba for some hundred steps with the kernels and with plain PyTorch.

Plain PyTorch has no kernel of ours at all; --backend other than 'cuda' has that scan alone. fp16
autocast and loss scaling, the same weights and batches. Two more runs of plain PyTorch show
what is noise: one in fp32, and one that sees the images in another order. The kernels' loss must
follow plain PyTorch's as closely as the other order does: the mean difference of the smoothed
curves may be no larger. A curve that does not fall shows nothing, and fails too.

Without --images, the classes are gratings of eight directions in noise.
"""


import argparse
import contextlib
import csv
import functools
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vmamba_mm.layers.ss2d
from vmamba_mm.layers import ConvDownsample, ConvStem, VSSBlock
from vmamba_mm.ops import BACKENDS, scan_norm
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.scan_kernels import cuda as scans

matplotlib.use('Agg')
import matplotlib.pyplot as plt

PLAIN = 'plain, fp16'
SMOOTH = 0.9  # of the exponential moving average
# Okabe and Ito's colours, told apart with every kind of colour vision; dashes besides.
STYLES = ({'color': '#000000'}, {'color': '#D55E00', 'linestyle': (0, (4, 2))},
          {'color': '#0072B2', 'linestyle': (0, (1, 1))},
          {'color': '#009E73', 'linestyle': (0, (6, 2, 1, 2)), 'alpha': 0.8})


def load_images(folder, size):
    """(N, 3, size, size) uint8 and labels (N) of a folder of class folders."""
    from PIL import Image

    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    images, labels = [], []
    for label, path in enumerate(classes):
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in ('.jpg', '.jpeg', '.png'):
                with Image.open(file) as image:
                    images.append(np.asarray(image.convert('RGB').resize((size, size))))
                labels.append(label)
    if len(set(labels)) < 2:
        raise SystemExit(f'error: {folder} has no two folders of JPEG or PNG images, one a class')
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def make_gratings(size, number=1024, classes=8):
    """Waves of a random length, phase and colour, whose direction is the class, in noise."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % classes
    angle = labels * torch.pi / classes
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    across = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    frequency, phase = torch.rand(2, number, 1, 1, generator=rng)
    wave = (across * (0.3 + 0.6 * frequency) + 2 * torch.pi * phase).sin()
    colour = 0.3 + torch.rand(number, 3, 1, 1, generator=rng)
    noise = torch.randn(number, 3, size, size, generator=rng)
    return (128 + 30 * wave[:, None] * colour + 40 * noise).clamp(0, 255).byte(), labels


def build(classes):
    """Stem, three stages of blocks, mean, classifier: about a million parameters."""
    torch.manual_seed(0)
    block = functools.partial(VSSBlock, mlp_ratio=4.0, drop_path=0.0, with_cp=False, ssm_cfg={})
    return nn.Sequential(
        ConvStem(3, 48), block(48), ConvDownsample(48), block(96), ConvDownsample(96), block(192),
        block(192), nn.LayerNorm(192), Mean(), nn.Linear(192, classes))


class Mean(nn.Module):
    def forward(self, x_BHWC):
        return x_BHWC.mean((1, 2))


@contextlib.contextmanager
def only(backend):
    """The scan by ``backend`` within; but for 'cuda', where all kernels are at work, everything
    else by plain PyTorch: a CUDA kernel that is asked for raises."""
    with contextlib.ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch.object(vmamba_mm.layers.ss2d, 'scan_norm',
                                  functools.partial(scan_norm, backend=backend)))
        if backend != 'cuda':
            replace(mock.patch.object(scans, 'why_not', lambda *args: 'not asked for'))
            replace(mock.patch.object(launch, 'load', side_effect=AssertionError('a kernel')))
            launch.forget()  # launches that are bound already
        yield


def train(images, labels, args, backend, order, half=True):
    """The loss of each step."""
    with only(backend):
        return _train(images, labels, args, order, half)


def _train(images, labels, args, order, half):
    device = images.device
    model = build(int(labels.max()) + 1).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / args.steps))
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    rng = torch.Generator().manual_seed(order)
    losses, began = [], time.monotonic()
    for _ in range(args.steps):
        picked = torch.randperm(len(images), generator=rng)[:args.batch].to(device)
        x = (images[picked].float() - 118) / 60
        with torch.autocast(device.type, torch.float16) if half else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), labels[picked])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    print(f'  {statistics.mean(losses[:10]):.3f} at first, {statistics.mean(losses[-10:]):.3f} at '
          f'last; {time.monotonic() - began:.0f} s', flush=True)
    return losses


def smooth(losses):
    """Exponential moving average; its start corrected for what it has not seen."""
    average, result = 0.0, []
    for i, loss in enumerate(losses):
        average = SMOOTH * average + (1 - SMOOTH) * loss
        result.append(average / (1 - SMOOTH ** (i + 1)))
    return result


def apart(curves):
    """{name: |smoothed loss - that of plain PyTorch in fp16| at each step}, for the other runs."""
    smoothed = {name: smooth(losses) for name, losses in curves.items()}
    return {name: [abs(a - b) for a, b in zip(losses, smoothed[PLAIN], strict=True)]
            for name, losses in smoothed.items() if name != PLAIN}


def plot(curves, path, title):
    """The losses, and below how far each run is from plain PyTorch in fp16."""
    figure, (above, below) = plt.subplots(2, figsize=(8, 7), layout='constrained', sharex=True,
                                          height_ratios=(2, 1))
    steps = range(1, len(curves[PLAIN]) + 1)
    differences = apart(curves)
    for (name, losses), style in zip(curves.items(), STYLES, strict=True):
        above.plot(steps, losses, linewidth=0.6, alpha=0.25, color=style['color'])
        above.plot(steps, smooth(losses), linewidth=2, label=name, **style)
        if name in differences:
            below.plot(steps, [max(d, 1e-6) for d in differences[name]], linewidth=1.5, **style)
    above.set(ylabel='training loss (bold: moving average)', title=title)
    above.set_ylim(bottom=0)
    above.legend()
    below.set(xlabel='step', ylabel=f'from "{PLAIN}"', yscale='log')
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=Path, metavar='DIR', help='a folder for each class')
    parser.add_argument('--size', type=int, default=64, help='side of the images')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--backend', choices=BACKENDS, default='cuda', help='what is compared')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/loss_curve'), metavar='DIR')
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if args.backend == 'cuda' and device.type != 'cuda':
        raise SystemExit('error: torch finds no GPU here; choose another --backend')
    torch.backends.cudnn.deterministic = True
    images, labels = (load_images(args.images, args.size) if args.images
                      else make_gratings(args.size))
    images, labels = images.to(device), labels.to(device)
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    data = args.images.name if args.images else 'gratings'
    setting = (f'{data}, {len(images)} images of {args.size}x{args.size}, {args.steps} steps of '
               f'{args.batch}\n{name}, torch {torch.__version__}')
    print(setting)
    runs = {f'{args.backend}, fp16': (args.backend, 0, True), PLAIN: ('chunked', 0, True),
            'plain, fp32': ('chunked', 0, False),
            'plain, fp16, other order': ('chunked', 1, True)}
    curves = {}
    for label, run in runs.items():
        print(label, flush=True)
        curves[label] = train(images, labels, args, *run)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(curves, args.out / 'loss_curve.png', setting)
    with open(args.out / 'loss_curve.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['step', *curves])
        for i, losses in enumerate(zip(*curves.values(), strict=True), 1):
            writer.writerow([i, *losses])
    differences = apart(curves)
    print('difference of smoothed losses from plain PyTorch in fp16:')
    for label, values in differences.items():
        print(f'  {label:28} mean {statistics.mean(values):.4f}, max {max(values):.4f}')
    print(f'wrote {args.out}/loss_curve.png and .csv')
    failures = []
    kernels, _, order = (statistics.mean(values) for values in differences.values())
    if not kernels <= order:
        failures.append('the kernels differ more than another order of the images does')
    losses = smooth(next(iter(curves.values())))
    if not losses[-1] < 0.8 * losses[0]:
        failures.append('the loss does not fall')
    if failures:
        sys.exit('FAILED: ' + '; '.join(failures))
    print('passed: no further from plain PyTorch than another order of the images')


if __name__ == '__main__':
    main()
