"""Whole training steps of detection and segmentation beside Swin-T and ConvNeXt-T on one GPU.

A step is mmengine's ``model.train_step``: preprocessing, forward, losses, backward and AdamW, in
fp32 and in fp16 autocast with AmpOptimWrapper. Mask R-CNN FPN at 800x1280 with batch 2 and UperNet
at 512x512 with batch 4 are those of our configs; a peer's backbone is that of its stock config of
mmdet or mmseg, drop path included. Besides: the backbone's forward of one 800x1280 image in fp16
autocast. The ratios to the peers of the same run come first: a step waits for the CPU at many
places, so absolute times belong to one machine.

The same for all: random images and annotations (on the GPU before the step, masks in the CPU's
memory as mmdet has them), random weights, BN for SyncBN, fused AdamW on our configs' few parameter
groups, cudnn.benchmark off, PyTorch's defaults for TF32, contiguous images. The learning rate is 0,
so that every step does the same work: with untrained weights about ten regions of an image reach
the mask head, fewer than in a long training, and the backbone's share is larger. The peak is that
of a step: parameters, gradients and the optimizer's state are in it.

Before a model is timed, drop path and dropout off: a step's loss in fp16 must be that in fp32, and
every parameter must get a finite gradient in both. Of our backbone, the maps of the last image must
be those of plain PyTorch in fp32 on the CPU, and the parameters' gradient by them likewise
(800x1280: fp16 against fp32 on the GPU, the CPU needs too long). What is wrong with ours ends the
run; a peer that fails is reported.
"""

import contextlib
import copy
import gc
import logging
import sys
import time
import traceback
from pathlib import Path

import dense_steps_report as report
import numpy as np
import torch
from bench_options import add_run_options, check_run_options
from bench_report import NAN, describe_tf32, device_name, show
from dense_steps_report import BACKBONE, MODELS, NUMBERS, OURS, WHAT, Case
from end_to_end import MAX_ERRORS as HALF_ERRORS
from end_to_end import WARM_UP, distance, flat_grad, median, peak_gib

import vmamba_mm
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.mm.measuring import median_ms

EXAMPLES = '''  python tools/bench/dense_steps.py --csv steps.csv --profile
  python tools/bench/dense_steps.py --tasks upernet --precisions fp16 --quick
  python tools/bench/dense_steps.py --merge steps.csv
  python tools/bench/dense_steps.py --device cpu --shrink 8 --tasks upernet --models swin_t'''
CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
#: task: our config, batch, height, width, the stock configs whose backbones the peers have
TASKS = {
    'mask-rcnn': (CONFIGS / 'vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py', 2, 800, 1280, {
        'swin_t': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        'convnext_t': 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'}),
    'upernet': (
        CONFIGS / 'vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py', 4, 512, 512, {
            'swin_t': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_'
                      'ade20k-512x512.py',
            'convnext_t': 'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_'
                          'ade20k-512x512.py'})}
PRECISIONS = ('fp32', 'fp16')
#: relative 2-norms of the errors of the maps and of the gradient; TF32 convolutions in fp32
MAX_ERRORS = {torch.float32: (5e-3, 2e-2), **HALF_ERRORS}
#: of a step's loss in fp16; other proposals survive, so that other regions are sampled
MAX_LOSS_ERROR = 5e-2
LARGEST_SCALE = 2.0**16  # where the loss scale of PyTorch begins
FEW_PIXELS = 512 * 512
OBJECTS = 8  # an image of COCO has 7


# --- models and data ------------------------------------------------------------------------

def make_config(task, name, side_by):
    """The config of a task with a backbone of random weights, batch, height and width."""
    path, batch, height, width, peers = TASKS[task]
    cfg = cli.load_config(str(path))
    if name in peers:
        cfg.model.backbone = cli.load_config(peers[name]).model.backbone
    cfg.model.backbone.init_cfg = None
    cli.sync_to_plain_batch_norm(cfg.model)
    height, width = (max(1, round(side / side_by / 32)) * 32 for side in (height, width))
    if task == 'upernet':
        cfg.model.data_preprocessor.size = (height, width)
    else:
        sampler = cfg.model.train_cfg.rcnn.sampler  # most of a CPU's time, and batch norm has none
        sampler.num = max(16, sampler.num // side_by**2)
    return cfg, 2 if side_by > 1 else batch, height, width


def make_detection(rng, height, width):
    """An annotated image: ellipses of 4 to 60 % of its sides."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    sizes = np.array([width, height]) * np.exp(rng.uniform(np.log(0.04), np.log(0.6), (OBJECTS, 2)))
    corners = rng.uniform(0, 1, (OBJECTS, 2)) * (np.array([width, height]) - sizes)
    centres = (corners + sizes / 2)[..., None, None]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)))
    radii = ((grid - centres) / (sizes[..., None, None] / 2)) ** 2
    sample = DetDataSample(metainfo=dict(
        img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(np.hstack([corners, corners + sizes]), dtype=torch.float32),
        labels=torch.from_numpy(rng.integers(0, 80, OBJECTS)),
        masks=BitmapMasks((radii.sum(1) <= 1).astype(np.uint8), height, width))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return sample


def make_segmentation(rng, height, width):
    """An annotated image: squares of 32 pixels of one class each, one in 20 of them ignored."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = rng.integers(0, 150, (height // 32, width // 32))
    classes[rng.random(classes.shape) < 0.05] = 255
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    labels = torch.from_numpy(classes.repeat(32, 0).repeat(32, 1))
    sample.gt_sem_seg = PixelData(data=labels[None])
    return sample


class Subject:
    """A model of a task, its batch, and what its backbone must give for the last image."""

    def __init__(self, task, name, args):
        from mmengine.registry import MODELS as REGISTRY
        from mmengine.registry import init_default_scope

        self.task = task
        self.cfg, batch, height, width = make_config(task, name, args.shrink)
        init_default_scope(self.cfg.default_scope)
        torch.manual_seed(0)
        self.model = REGISTRY.build(self.cfg.model)
        self.model.init_weights()
        self.model.to(args.device).train()
        self.device = args.device
        rng = np.random.default_rng(0)
        make = make_detection if task == 'mask-rcnn' else make_segmentation
        images = torch.from_numpy(rng.integers(0, 256, (batch, 3, height, width), np.uint8))
        self.data = dict(inputs=list(images.to(args.device)), data_samples=[
            make(rng, height, width).to(args.device) for _ in range(batch)])
        self.images = self.preprocess()['inputs']
        self.expected = self.expected_grad = None

    def preprocess(self):
        return self.model.data_preprocessor(dict(self.data), True)

    def dtype(self, precision):
        half = torch.float16 if self.device == 'cuda' else torch.bfloat16  # as mmengine's
        return half if precision == 'fp16' else torch.float32

    def autocast(self, precision, whole_step=False):
        # mmcv's regions and suppression have no half precision on a CPU.
        enabled = precision == 'fp16' and not (whole_step and self.device == 'cpu'
                                               and self.task == 'mask-rcnn')
        return torch.autocast(self.device, self.dtype('fp16'), enabled=enabled)

    def make_step(self, precision):
        """A training step without arguments."""
        from mmengine.optim import build_optim_wrapper

        amp = precision == 'fp16' and self.device == 'cuda'
        cfg = copy.deepcopy(self.cfg.optim_wrapper)
        cfg.type = 'AmpOptimWrapper' if amp else 'OptimWrapper'
        cfg.optimizer.lr = 0.0
        wrapper = build_optim_wrapper(self.model, cfg)

        def step():
            # mmengine's wrapper has its own autocast, but on GPUs only.
            with contextlib.nullcontext() if amp else self.autocast(precision, True):
                self.model.train_step(dict(self.data), wrapper)

        return step

    def make_backbone_step(self, precision):
        """Its forward and backward, what the profile takes as its part of a step."""
        backbone, held = self.model.backbone, []

        def step():
            with self.autocast(precision):
                maps = backbone(self.images)
            if not held:
                held.extend(torch.randn_like(m) for m in maps)
            torch.autograd.backward(maps, held)
            backbone.zero_grad(set_to_none=True)

        return step

    def make_forward(self):
        """A forward of one image by the backbone, for the maps."""
        image = self.images[-1:].clone()

        def forward():
            with torch.inference_mode(), self.autocast('fp16'):
                return self.model.backbone(image)

        return forward


# --- correctness ----------------------------------------------------------------------------

@contextlib.contextmanager
def dropping_off(model):
    """No drop path and no dropout within: two passes give the same."""
    dropping = [m for m in model.modules() if 'Drop' in type(m).__name__ and m.training]
    for module in dropping:
        module.training = False
    yield
    for module in dropping:
        module.training = True


def demand(holds, case, text):
    if not holds:
        raise UserError(f'{case.model} is wrong, not timed: {case.what}: {text}')


def check(subject, task, name):
    """{precision: numbers} of a model, before it is timed.

    Raises:
        UserError: if its results are wrong.
    """
    numbers_of = {precision: dict.fromkeys(NUMBERS, NAN) for precision in PRECISIONS}
    with dropping_off(subject.model):
        for precision, numbers in numbers_of.items():
            case = Case(name, task, precision)
            numbers['loss'] = check_step(subject, case)
            if name == OURS:
                check_backbone(subject, case, numbers)
    fp32, fp16 = (numbers_of[precision]['loss'] for precision in PRECISIONS)
    error = numbers_of['fp16']['loss_error'] = abs(fp16 - fp32) / abs(fp32)
    demand(error <= MAX_LOSS_ERROR, case, f'the loss is {fp16:.4f}, in fp32 {fp32:.4f}')
    return numbers_of


def check_step(subject, case):
    """The loss of a step, every gradient of which is finite at some loss scale."""
    model = subject.model
    scale = LARGEST_SCALE if case.precision == 'fp16' else 1.0
    while True:
        torch.manual_seed(0)  # regions are sampled
        data = subject.preprocess()
        with subject.autocast(case.precision, True):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        demand(loss.isfinite(), case, f'the loss is {loss.item()}')
        (loss * scale).backward()
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        without = [name for name, p in params.items() if p.grad is None]
        demand(not without, case, f'no gradient for {", ".join(without)}')
        infinite = [name for name, p in params.items() if not p.grad.isfinite().all()]
        model.zero_grad(set_to_none=True)
        if not infinite:
            return loss.item()
        scale /= 2
        demand(scale >= 1, case, f'no finite gradient for {", ".join(infinite)[:300]}')


def check_backbone(subject, case, numbers):
    """Sets the errors of the maps and of the parameters' gradient by them."""
    backbone, images = subject.model.backbone, subject.images
    with_grad = images[-1, 0].numel() <= FEW_PIXELS
    if subject.expected is None:
        reference = copy.deepcopy(backbone).cpu()
        with torch.set_grad_enabled(with_grad):
            maps = reference(images[-1:].cpu())
        subject.expected = [m.detach() for m in maps]
        rng = torch.Generator().manual_seed(0)
        subject.cotangents = [torch.randn(m.shape, generator=rng) for m in maps]
        if with_grad:
            torch.autograd.backward(maps, subject.cotangents)
            subject.expected_grad = flat_grad(reference)
    with subject.autocast(case.precision):
        maps = backbone(images)
    compare(subject, case, numbers, [m.detach()[-1:] for m in maps])
    # No gradient by the other images, so that the parameters' is that of the last one.
    cotangents = [torch.zeros_like(m) for m in maps]
    for whole, last in zip(cotangents, subject.cotangents, strict=True):
        whole[-1:] = last.to(whole)
    torch.autograd.backward(maps, cotangents)
    grad = flat_grad(backbone)
    backbone.zero_grad(set_to_none=True)
    if subject.expected_grad is None:  # a large image, in fp32, which comes first
        subject.expected_grad = grad
        return
    error = numbers['grad_error'] = distance([grad], [subject.expected_grad])
    limit = MAX_ERRORS[subject.dtype(case.precision)][1]
    demand(error <= limit, case, f"the backbone's gradient is {error:.1e} from fp32 (relative "
           f'2-norm), allowed {limit:.0e}')


def compare(subject, case, numbers, maps):
    """Sets the error of the maps of the last image."""
    error = numbers['error'] = distance(maps, subject.expected)
    limit = MAX_ERRORS[subject.dtype(case.precision)][0]
    demand(error <= limit, case, f"the backbone's maps are {error:.1e} from fp32 on the CPU "
           f'(relative 2-norm), allowed {limit:.0e}')


# --- measuring ------------------------------------------------------------------------------

def time_ms(function, args):
    """A step takes a fifth of a second: a median needs more time than that of end_to_end.py."""
    if args.device == 'cpu':
        return median(function, args)
    for _ in range(WARM_UP):
        function()
    return median_ms(function, 600 if args.quick else 3000)


def kernels_ms(function, args):
    """The ms that the GPU's kernels of a call take together."""
    if args.device == 'cpu':
        return NAN
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    # An annotation, as the optimizer's, spans kernels that count by themselves.
    return sum(event.self_device_time_total for event in profiler.key_averages()
               if event.device_type == torch.autograd.DeviceType.CUDA
               and not event.is_user_annotation) / 1e3


def measure(subject, checked, case, args):
    """The numbers of a case; ``checked`` are those of its check."""
    numbers = dict.fromkeys(NUMBERS, NAN)
    if case.task == BACKBONE:
        subject.model.eval()
        function = subject.make_forward()
        if case.model == OURS:
            compare(subject, case, numbers, [m.clone() for m in function()])
        numbers['ms'] = time_ms(function, args)
        return numbers
    function = subject.make_step(case.precision)
    numbers |= checked[case.precision]
    numbers |= dict(ms=time_ms(function, args), peak_gib=peak_gib(function, args))
    return numbers


def profile(subject, case, numbers, args):
    numbers['kernels_ms'] = kernels_ms(subject.make_step(case.precision), args)
    part = subject.make_backbone_step(case.precision)
    numbers['backbone_kernels_ms'] = kernels_ms(part, args)


def prepare(task, name, args):
    """A model that was checked, and the numbers of that."""
    start = time.monotonic()
    subject = Subject(task, name, args)
    checked = check(subject, task, name)
    tell(f'{name}: {WHAT[task]}: built and checked', start)
    return subject, checked


def attempt(name, function, *args):
    """(result, problem): a model that fails is reported, if ours is wrong that ends the run."""
    try:
        return function(*args), ''
    except UserError as err:
        if name == OURS:
            raise
        return None, str(err)
    except Exception as err:
        if name == OURS:
            traceback.print_exc()
        return None, f'{type(err).__name__}: {" ".join(str(err).split())[:200]}'


def measure_all(args, rows, setting):
    """Adds to ``rows``, and to the CSV file after each: a run may be cut off."""
    for task, name in ((task, name) for task in args.tasks for name in args.models):
        cases = [Case(name, task, precision) for precision in args.precisions]
        if task == 'mask-rcnn':
            cases.append(Case(name, BACKBONE, 'fp16'))  # last, as it leaves the mode of training
        made, broken = attempt(name, prepare, task, name, args)
        for case in cases:
            release(args)  # or what the case before had would count in the peak
            start = time.monotonic()
            numbers, problem = (None, broken) if broken else attempt(
                name, measure, *made, case, args)
            row = rows[case] = {**(numbers or dict.fromkeys(NUMBERS, NAN)), 'problem': problem,
                                **setting}
            save(args, rows)
            if args.profile and numbers and case.task != BACKBONE:
                _, failure = attempt(name, profile, made[0], case, row, args)
                tell(f'{name}: profile: {failure or "done"}', start)
                save(args, rows)
            tell(f'{name}: {case.what}: '
                 + (problem or f'{row["ms"]:.1f} ms, {show(row["peak_gib"])} GiB'), start)
        made = numbers = None
        release(args)


def release(args):
    gc.collect()
    if args.device == 'cuda':
        torch.cuda.empty_cache()


def save(args, rows):
    if args.csv:
        report.SHEET.write(args.csv, rows)


def tell(text, start):
    print(f'  {text} [{time.monotonic() - start:.0f} s]', file=sys.stderr, flush=True)


# --- command line ---------------------------------------------------------------------------

def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, metavar='TASK',
                        help=f'{", ".join(TASKS)} (default: all; none with --merge)')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS, metavar='MODEL',
                        help=f'{", ".join(MODELS)} (default: all)')
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, default=PRECISIONS,
                        metavar='PRECISION', help='fp32, fp16 (default: both)')
    parser.add_argument('--profile', action='store_true',
                        help="the time of the GPU's kernels too, and the backbone's share of it")
    add_run_options(parser, 'sides by N, batch 2, fewer regions, to try the tool out where there '
                    'is no GPU; fp16 is bf16 there, and fp32 in a step of Mask R-CNN')
    args = parser.parse_args()
    args.tasks = check_run_options(args, args.tasks, tuple(TASKS), '--device cpu --shrink 8')
    return args


def prepare_packages():
    """Import mm* and this package, quietly; the versions of mm*."""
    prepare_mm()
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        require_working(package)
    import mmdet
    import mmpretrain
    import mmseg
    from mmengine.logging import MMLogger

    import vmamba_mm.models  # noqa: F401  (before mmengine reads a config of ours)

    MMLogger.get_current_instance().setLevel(logging.ERROR)  # a line for each parameter
    return (f'mmdet {mmdet.__version__}, mmseg {mmseg.__version__}, mmpretrain '
            f'{mmpretrain.__version__}')


def main():
    args = parse_args()
    rows = {}
    for path in args.merge:
        rows |= report.SHEET.read(path)
    setting = dict(device=device_name(args.device), torch=torch.__version__,
                   mm=prepare_packages(), shrink=str(args.shrink)
                   ) if args.tasks else report.SHEET.find_setting(rows)
    report.SHEET.find_setting({**rows, None: setting})
    print(f'{setting["device"]}; torch {setting["torch"]}, {setting["mm"]}')
    if setting['shrink'] != '1':
        print(f'every side by {setting["shrink"]}: nothing to compare with')
    if args.tasks:
        torch.backends.cudnn.benchmark = False
        print(f'vmamba_mm {vmamba_mm.__version__}; cudnn.benchmark off, {describe_tf32()}')
    sys.stdout.flush()
    measure_all(args, rows, setting)
    report.print_ratios(rows)
    report.print_anchors(rows)
    report.print_rows(rows)
    save(args, rows)
    failed = sorted({case.what for case, row in rows.items()
                     if case.model == OURS and row['problem']})
    if failed:
        raise UserError(f'{OURS} failed: {"; ".join(failed)}: see above')


if __name__ == '__main__':
    cli.run(main)
