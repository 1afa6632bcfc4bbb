"""Accuracy, FLOPs, throughput and memory of classifiers at several image sizes.

As in the resolution study of VMamba (arXiv 2401.10166): a model that was trained at one size, run
at others. The measures:

accuracy    Top-1 on the config's own test data, where a checkpoint is given. Every resizing and
            cropping of the test pipeline is scaled by the same factor, as the public code does:
            ResizeEdge 256 and CenterCrop 224 become 438 and 384.
FLOPs       Of one image, as tools/analysis/get_flops.py counts them: one multiply-add is 1. A
            least-squares line of FLOPs on pixels, and the exponent of a least-squares power law,
            which is 1 for a model that grows linearly.
throughput  Images/s of the forward up to the logits: median of warm calls, images on the device,
            PyTorch's default memory format. Measured after the output was found to be finite and
            of the right shape.
memory      Peak of that forward. On a GPU, what PyTorch has allocated. On a CPU, the weights, the
            images, and the rise of the process's resident set in one forward, which repeats to
            some 20 % (Linux only, else left out). The picture has it for each image and without
            the weights: the rise by the number of images, and the image.

Batches have as many pixels at every size as --batch-size images of the smallest, so that larger
images do not fill the memory. A backbone that takes img_size (ViT, Swin, ...) is built for each
size; its position embeddings are resized as mmpretrain does when it loads weights.
"""

import copy
import gc
import inspect
from pathlib import Path

import resolution_report as report

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, flops, measuring
from vmamba_mm.mm.inputs import (
    NONE,
    add_model_options,
    build_random,
    check_model_options,
    short_names,
)

EXAMPLES = """\
  python tools/analysis/resolution.py configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py \\
      mmpretrain::deit/deit-small_4xb256_in1k.py \\
      --checkpoint vmamba_mm://vmamba/tiny_s1l8 none --dtype fp16
  python tools/analysis/resolution.py CONFIG --resolutions 224 384 --device cpu --batch-size 2"""

RESOLUTIONS = (224, 288, 384, 512, 640, 768, 1024)  # the paper's
DTYPES = ('fp32', 'fp16')
BATCH = {'gpu': 64, 'cpu': 8}
# Test transforms that set a size, and where.
RESIZES = {'ResizeEdge': 'scale', 'Resize': 'scale'}
CROPS = {'CenterCrop': 'crop_size', 'EfficientNetCenterCrop': 'crop_size'}


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    add_model_options(parser, 'configs of classifiers', ', which gets random weights')
    parser.add_argument('--resolutions', type=int, nargs='+', default=RESOLUTIONS,
                        metavar='PIXELS', help='sides of the images (default: '
                        f'{" ".join(map(str, RESOLUTIONS))})')
    parser.add_argument('--num-images', type=int, metavar='N',
                        help='how many test images, spread evenly over the data set; 0 for no '
                        'accuracy (default: all)')
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='images of the smallest size in a batch; of a larger size, those '
                        f'with as many pixels, at least one (default: {BATCH["gpu"]} on a GPU, '
                        f'else {BATCH["cpu"]})')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32',
                        help='fp16: autocast, on a GPU; for speed, memory and accuracy (default: '
                        'fp32)')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights (default: 0)')
    cli.add_device_option(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/resolution'),
                        metavar='FOLDER', help='for the pictures, resolution.csv and .json '
                        '(default: work_dirs/resolution)')
    cli.add_common_options(parser, launcher=False)
    args = parser.parse_args()
    args.resolutions = sorted(set(args.resolutions))
    check_model_options(args, resolutions=1, num_images=0, batch_size=1)
    return args


# --- models of a size -------------------------------------------------------------------------

class Subject:
    """A config with its weights, if there are any, to be built for any size."""

    def __init__(self, name, cfg, checkpoint, args):
        from vmamba_mm.checkpoints.files import read_checkpoint
        from vmamba_mm.mm.hooks.strict_load import check_fits

        task = cli.find_task(cfg)
        if task is None or task.name != 'cls':
            raise UserError(f'{name} is no classifier of mmpretrain; detectors and segmentors are '
                            'measured by tools/bench/dense_steps.py')
        self.name, self.cfg, self.seed, self.state = name, cfg, args.seed, None
        model = build_random(copy.deepcopy(cfg), args.seed)
        if not hasattr(getattr(model, 'head', None), 'num_classes'):
            raise UserError(f'{name}: the model {type(model).__name__} has no head with '
                            'num_classes, which tells what its output has to be')
        backbone = type(model.backbone)
        self.channels = flops.find_channels(cfg, model)
        self.has_size = any('img_size' in inspect.signature(base.__init__).parameters
                            for base in backbone.__mro__)
        if checkpoint != NONE:
            held = read_checkpoint(checkpoint, args.weights, likely=cli.families_of(cfg))
            self.state, _ = check_fits(model, held, checkpoint)

    def config_at(self, size):
        cfg = copy.deepcopy(self.cfg)
        if self.has_size:
            cfg.model.backbone.img_size = size
        return cfg

    def count_at(self, size):
        """Count the model on an image of ``size``, as flops.py does."""
        try:
            return flops.count(self.config_at(size), (size, size))
        except (AssertionError, RuntimeError, ValueError) as err:
            raise UserError(f'{self.name} at {size}x{size}: {err}') from err

    def build_at(self, size):
        model = build_random(self.config_at(size), self.seed)
        if self.state is not None:
            try:
                model.load_state_dict(self.state)
            except RuntimeError as err:
                raise UserError(f'{self.name}: mmpretrain does not fit the weights of the '
                                f'checkpoint to {size}x{size}: {err}') from err
        return model.requires_grad_(False)


# --- accuracy ---------------------------------------------------------------------------------

def scale_pipeline(pipeline, size):
    """Scale all that sets a size in a test pipeline, so that it makes size x size images.

    Raises:
        UserError: if it makes no square images of one size.
    """
    steps = [(step, keys[kind]) for step in pipeline for keys in (RESIZES, CROPS)
             for kind in [type_name(step)] if kind in keys]
    original_size, padded = None, []
    for step, key in steps:
        sides = step[key] if isinstance(step[key], tuple | list) else (step[key],)
        if len(set(sides)) > 1:
            raise UserError(f'the test pipeline makes images that are not square: {dict(step)}')
        step[key] = sides[0]
        if type_name(step) != 'ResizeEdge':
            original_size = sides[0]
        if type_name(step) == 'EfficientNetCenterCrop':
            padded.append((step, 'crop_padding'))
            step.setdefault('crop_padding', 32)  # its default
    if original_size is None:
        raise UserError('the test pipeline has no step that makes images of one size: '
                        f'{", ".join(["Resize", *CROPS])}')
    for step, key in steps + padded:
        value = step[key] * size // original_size
        square = type_name(step) == 'Resize'  # one number may keep a ratio
        step[key] = (value, value) if square else value


def build_loader(cfg, size, batch, num_images):
    """The config's test data at a size: all, or ``num_images`` of it, spread evenly."""
    from mmengine.registry import DATASETS
    from mmengine.runner import Runner

    from vmamba_mm.mm.hooks.data import check_dataset, install_reader

    loader = copy.deepcopy(cfg.test_dataloader)
    for _, dataset in cli.datasets_of(loader.dataset, ''):
        scale_pipeline(dataset.pipeline, size)
    dataset = DATASETS.build(loader.pop('dataset'))
    dataset.full_init()
    check_dataset(dataset)
    if num_images is not None and num_images < len(dataset):
        dataset.get_subset_([i * len(dataset) // num_images for i in range(num_images)])
    loader.update(batch_size=batch, persistent_workers=False)
    built = Runner.build_dataloader({**loader, 'dataset': dataset})
    install_reader(built)
    return built


def measure_accuracy(model, cfg, size, batch, args):
    """Top-1 in %, and of how many images."""
    import torch
    from mmengine.evaluator import Evaluator
    from mmengine.utils import track_iter_progress

    loader = build_loader(cfg, size, batch, args.num_images)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for data in track_iter_progress((loader, len(loader))):
        with torch.inference_mode(), autocast(args):
            outputs = model.test_step(data)
        evaluator.process(data_samples=outputs, data_batch=data)
    print()  # ends the line of the progress bar
    metrics = evaluator.evaluate(len(loader.dataset))
    if 'accuracy/top1' not in metrics:
        raise UserError(f'the test_evaluator gives no accuracy/top1, but {", ".join(metrics)}')
    return metrics['accuracy/top1'], len(loader.dataset)


def find_test_data(cfg, state, args):
    """'' if the accuracy can be measured, else why it cannot."""
    if state is None:
        return 'no checkpoint'
    if args.num_images == 0:
        return '--num-images 0'
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        return 'the config has no test_dataloader and test_evaluator'
    try:
        cli.check_data_paths(cfg, 'test_dataloader')
    except UserError as err:
        return str(err)
    return ''


# --- speed and memory -------------------------------------------------------------------------

def autocast(args):
    import torch

    return torch.autocast('cuda', torch.float16, enabled=args.dtype == 'fp16')


def check_logits(logits, batch, classes, what):
    """Raise one line unless an output is what a classifier gives: speed counts only then."""
    import torch

    if not isinstance(logits, torch.Tensor) or logits.shape != (batch, classes):
        actual = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f'{what}: the output is {actual} instead of {(batch, classes)}: not timed')
    if not logits.isfinite().all():
        raise UserError(f'{what}: the output is not finite: not timed')


def measure_speed(model, size, batch, args, what, channels=3):
    """{column: value} of throughput and memory."""
    import torch

    on_gpu = args.device.startswith('cuda')
    images = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(args.device)

    def forward():
        with torch.inference_mode(), autocast(args):
            return model(images, mode='tensor')

    check_logits(forward(), batch, model.head.num_classes, what)
    ms = measuring.median(forward, on_gpu)
    measured = dict(ms=ms, images_per_s=batch / ms * 1e3)
    memory = measuring.held_and_peak(forward, on_gpu)
    if memory is not None:
        held, peak = memory
        if not on_gpu:  # the process holds libraries too
            weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            held, peak = weights + images.nbytes, weights + images.nbytes + peak - held
        measured |= dict(peak_mib=peak / 2**20,
                         mib_per_image=(peak - held + images.nbytes) / batch / 2**20)
    return measured


def measure(subject, count, size, batch, args):
    """A row of the table; what is not measured is None."""
    import torch

    row = dict.fromkeys(report.COLUMNS) | dict(
        model=subject.name, resolution=size, batch=batch, parameters=count.parameters,
        flops=count.flops, problem='')
    cfg = subject.config_at(size)
    cli.set_loader_defaults(cfg, cli.find_task(cfg))
    try:
        model = subject.build_at(size).to(args.device)
        row |= measure_speed(model, size, batch, args, f'{subject.name} at {size}x{size}',
                             subject.channels)
        if not subject.no_accuracy:
            row['accuracy'], row['images'] = measure_accuracy(model, cfg, size, batch, args)
    except torch.OutOfMemoryError:
        row['problem'] = 'the GPU memory is used up: lower --batch-size'
    finally:
        model = None
        gc.collect()
        if args.device.startswith('cuda'):
            torch.cuda.empty_cache()
    return row


def main():
    args = parse_args()
    configs = [cli.load_config(path, args.cfg_options) for path in args.configs]
    import logging

    import torch
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.ERROR)  # a line for each parameter
    args.device = cli.choose_device(args.device)
    on_gpu = args.device.startswith('cuda')
    if on_gpu:
        torch.cuda.set_device(torch.device(args.device).index or 0)
    elif args.dtype != 'fp32':
        raise UserError(f'--dtype {args.dtype} is for a GPU; on a CPU leave it out')
    torch.backends.cudnn.benchmark = True
    first = args.batch_size or BATCH['gpu' if on_gpu else 'cpu']
    batches = {size: max(1, first * args.resolutions[0]**2 // size**2)
               for size in args.resolutions}
    names = short_names(args.configs)
    files = args.checkpoint or [NONE] * len(names)

    # What can go wrong early does: configs, weights, sizes, before the first measurement.
    subjects, counts = [], {}
    for name, cfg, file in zip(names, configs, files, strict=True):
        subject = Subject(name, cfg, file, args)
        subjects.append(subject)
        counts |= {(name, size): subject.count_at(size) for size in args.resolutions}
        subject.no_accuracy = find_test_data(cfg, subject.state, args)
        print(f'{name}: FLOPs counted'
              + (f'; no accuracy: {subject.no_accuracy}' if subject.no_accuracy else ''),
              flush=True)

    threads = torch.get_num_threads()
    setting = dict(
        device=torch.cuda.get_device_name() if on_gpu
        else f'CPU, {threads} thread{"s" if threads > 1 else ""}',
        dtype='fp16 autocast' if args.dtype == 'fp16' else args.dtype,
        torch=torch.__version__, multiply_add=1, num_images=args.num_images, seed=args.seed,
        configs=dict(zip(names, args.configs, strict=True)),
        checkpoints=dict(zip(names, files, strict=True)),
        no_accuracy={s.name: s.no_accuracy for s in subjects if s.no_accuracy})
    args.out.mkdir(parents=True, exist_ok=True)
    rows, total = [], len(counts)
    for subject in subjects:
        for size in args.resolutions:
            row = measure(subject, counts[subject.name, size], size, batches[size], args)
            rows.append(row)
            print(f'[{len(rows)}/{total}] {report.describe(row)}', flush=True)
            report.write(rows, setting, args.out)  # a long run may be cut off
    report.show(rows)
    pictures = report.draw_all(rows, setting, args.out)
    print(f'wrote {args.out}/resolution.csv, .json, {", ".join(pictures)}')


if __name__ == '__main__':
    cli.run(main)
