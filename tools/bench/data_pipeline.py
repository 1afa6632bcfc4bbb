"""Images/s that one CPU core delivers to training: the stock ImageNet pipeline and the fast one.

Both pipelines are read from their configs. First the fast one is checked: with Pillow's resize and
without erasing it must give the stock image, bit for bit, for every file; a difference ends the run
before any timing. Then each step is timed in CPU time of this thread (so that other processes on
the machine matter little), the pipelines in turn with the same random draws; the best round counts.
With --workers, batches also come through a DataLoader, in wall-clock time.

Without --images, 64 JPEGs of 500x375 pixels and about 110 kB, ImageNet's average, are made of noise
with the spectrum of photographs.

Example: python tools/bench/data_pipeline.py --images data/imagenet/val --limit 500 --workers 2
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from vmamba_mm.mm.compat import prepare_mm
from vmamba_mm.mm.measuring import cpu_name

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/vmamba'
NAMES = {'stock': 'vmamba-tiny-s1l8_8xb128_in1k-224.py',
         'fast': 'vmamba-tiny-s1l8_8xb128-fast_in1k-224.py'}
BATCH = 128


def make_images(folder, number=64, size=(375, 500)):
    """Noise whose amplitude falls as 1/f, with channels that follow one another."""
    rng = np.random.default_rng(0)
    f = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in size), indexing='ij'))
    f[0, 0] = 1
    for i in range(number):
        waves = np.fft.fft2(rng.normal(size=(4, *size))) / f
        planes = np.fft.ifft2(waves * (f < 0.35)).real  # a lens blurs the finest waves
        planes /= planes.std(axis=(1, 2), keepdims=True)
        image = 120 + 55 * (0.9 * planes[3] + 0.3 * planes[:3])
        image = np.clip(image.transpose(1, 2, 0), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f'{i}.jpg'), image, [cv2.IMWRITE_JPEG_QUALITY, 93])


def find_images(folder, limit):
    files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg'))
    if not files:
        sys.exit(f'error: {folder} has no JPEG files')
    return [str(p) for p in files[::max(1, len(files) // limit)][:limit]]


def build(pipeline):
    from mmengine.registry import TRANSFORMS

    return [TRANSFORMS.build(t) for t in copy.deepcopy(pipeline)]


def run(transforms, file, seconds=None):
    results = dict(img_path=file, gt_label=0, sample_idx=0)
    for i, transform in enumerate(transforms):
        start = time.thread_time()
        results = transform(results)
        if seconds is not None:
            seconds[i] += time.thread_time() - start
    return results


def verify(pipelines, files):
    """Equal to the stock image but for the two steps that say otherwise; those within bounds."""
    exact, shown = {}, {}
    for name, pipeline in pipelines.items():
        exact[name], shown[name] = build(pipeline), build(pipeline)
        exact[name][4].erase_prob = shown[name][4].erase_prob = 0.
    exact['fast'][1].backend = 'pillow'
    for seed, file in enumerate(files):
        images = {}
        for name, transforms in exact.items():
            np.random.seed(seed)
            images[name] = run(transforms, file)['inputs']
        if not torch.equal(images['stock'], images['fast']):
            sys.exit(f'The fast pipeline is wrong for {file}, seed {seed}; nothing was timed.')
    print(f'{len(files)} images: the fast pipeline with backend=pillow gives the stock bits',
          flush=True)
    counts = np.zeros(256, np.int64)
    for seed, file in enumerate(files):
        np.random.seed(seed)
        loaded = shown['stock'][0](dict(img_path=file))
        crops = []
        for name in ('stock', 'fast'):
            np.random.seed(seed)
            crops.append(shown[name][1](dict(loaded))['img'].astype(np.int16))
        counts += np.bincount(np.abs(crops[0] - crops[1]).ravel(), minlength=256)
    share = counts / counts.sum()
    print(f'backend=torch, the config\'s: {share[0]:.2%} of the values equal, {share[1]:.2%} one '
          f'grey level apart, {share[2:].sum():.4%} more, at most {np.flatnonzero(counts)[-1]}')


def time_steps(built, files, rounds):
    """{name: seconds per image of each step}, of the round with the smallest sum."""
    best = {}
    for _ in range(rounds):
        for name, transforms in built.items():
            np.random.seed(0)
            torch.manual_seed(0)
            seconds = np.zeros(len(transforms))
            for file in files:
                run(transforms, file, seconds)
            if name not in best or seconds.sum() < best[name].sum():
                best[name] = seconds
    return {name: seconds / len(files) for name, seconds in best.items()}


class Files(torch.utils.data.Dataset):
    def __init__(self, transforms, files, length):
        self.transforms, self.files, self.length = transforms, files, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return run(self.transforms, self.files[i % len(self.files)])


def one_thread(worker=0):
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def time_loader(transforms, files, workers):
    """Images/s of a DataLoader, from the first batch of each worker on."""
    from mmengine.dataset import default_collate

    dataset = Files(transforms, files, BATCH * workers * 6)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=workers, collate_fn=default_collate,
        worker_init_fn=one_thread, pin_memory=torch.cuda.is_available())
    for i, _ in enumerate(loader):
        if i == workers - 1:
            start = time.perf_counter()
    return (len(dataset) - BATCH * workers) / (time.perf_counter() - start)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=Path, help='a folder of JPEGs, read with its subfolders')
    parser.add_argument('--limit', type=int, default=200, help='files to read (default: 200)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int, default=0,
                        help='also time a DataLoader with so many processes')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/bench/data_pipeline.json'))
    args = parser.parse_args()
    if min(args.limit, args.rounds) < 1 or args.workers < 0:
        parser.error('--limit and --rounds must be at least 1, --workers at least 0')
    return args


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            args.images = Path(folder)
            make_images(args.images)
        bench(args, find_images(args.images, args.limit))


def bench(args, files):
    prepare_mm()
    import mmpretrain
    import PIL
    import torchvision
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    one_thread()
    init_default_scope('mmpretrain')
    pipelines = {name: Config.fromfile(CONFIGS / file).train_dataloader.dataset.pipeline
                 for name, file in NAMES.items()}
    sizes = [cv2.imread(file).shape[:2] for file in files]
    setting = (
        f'{cpu_name()}, {os.cpu_count()} cores; {len(files)} JPEGs, mean '
        f'{np.mean([w for _, w in sizes]):.0f}x{np.mean([h for h, _ in sizes]):.0f}, '
        f'{np.mean([os.path.getsize(f) for f in files]) / 1e3:.0f} kB; torch {torch.__version__}, '
        f'torchvision {torchvision.__version__}, opencv {cv2.__version__}, Pillow '
        f'{PIL.__version__}, numpy {np.__version__}, mmpretrain {mmpretrain.__version__}, '
        f'Python {platform.python_version()}')
    print(setting)
    verify(pipelines, files)

    built = {name: build(pipeline) for name, pipeline in pipelines.items()}
    seconds = time_steps(built, files, args.rounds)
    print(f'\n{"CPU ms per image, one thread":30s}{"stock":>8s}{"fast":>8s}')
    for i, transform in enumerate(built['stock']):
        print(f'{type(transform).__name__:30s}'
              + ''.join(f'{seconds[name][i] * 1e3:8.3f}' for name in NAMES))
    totals = {name: s.sum() for name, s in seconds.items()}
    print(f'{"sum":30s}' + ''.join(f'{t * 1e3:8.3f}' for t in totals.values()))
    print(f'{"images/s per core":30s}' + ''.join(f'{1 / t:8.0f}' for t in totals.values())
          + f'   ({totals["stock"] / totals["fast"]:.2f} times)')
    rates = {}
    if args.workers:
        rates = {name: time_loader(built[name], files, args.workers) for name in NAMES}
        print(f'{f"DataLoader, {args.workers} workers, images/s":30s}'
              + ''.join(f'{r:8.0f}' for r in rates.values()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    steps = [type(t).__name__ for t in built['stock']]
    args.out.write_text(json.dumps(dict(
        setting=setting, workers=args.workers, loader=rates,
        seconds={name: dict(zip(steps, s.tolist(), strict=True)) for name, s in seconds.items()},
    ), indent=2) + '\n')
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
