"""Training steps on several GPUs of one host: images a second, and whether they are right.

Three tasks: 'cls', VMamba-T (s1l8) at 224x224 with DDP, 128 images a GPU; 'mask-rcnn', our config
at 800x1280 with DDP, 2 images a GPU, in fp16 with its loss scale; 'fsdp', VMamba-B (s1l20) at
224x224 with FSDP2, 64 images a GPU. cls and fsdp run in bf16 autocast, which needs no loss scale.
DDP has the options and the shared buckets that tools/dist_train.sh gives it; FSDP2 is
vmamba_mm.layers.parallel's shard and on_shards. 'compiled' is torch.compile of the whole classifier
before DDP wraps it, or of each block before FSDP2 does; 'no replay' switches off the CUDA graphs
that blocks are replayed from (VMAMBA_MM_GRAPHS=0).

Efficiency is images/s by those of as many single GPUs of the same run, where the single GPU has no
wrapper at all. A step is forward, loss, backward and AdamW, on random images that lie on the GPU;
drop path is 0. Its time is that of the slowest process: the median of groups of steps between
barriers. 'alone' is the same for the same processes without a wrapper, each with its own data and
no exchange: what it takes more than one GPU is the machine's, or the data's, and not the wrapper's.

Before a case is timed:
  gradients   those of all processes together against one GPU's, by relative 2-norm, in fp32
              without TF32: of the whole batch at once; Mask R-CNN, whose losses sample regions on
              each GPU, of the batches of the processes one after the other, averaged
  parameters  after 20 training steps they must be equal on all processes to the bit
What is wrong ends the run.
"""

import contextlib
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import dense_steps
import numpy as np
import torch
import torch.distributed as dist
from bench_options import add_run_options, check_run_options
from bench_report import NAN, Sheet, device_name, print_table, show_in
from end_to_end import distance, flat_grad
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from vmamba_mm.errors import UserError
from vmamba_mm.layers.parallel import on_shards, shard, share_buckets
from vmamba_mm.mm import cli

EXAMPLES = '''  python tools/bench/scaling.py --gpus 1 2 4 --csv scaling.csv
  python tools/bench/scaling.py --tasks cls --ways eager --quick
  python tools/bench/scaling.py --device cpu --shrink 16 --tasks cls --ways eager --quick'''
TASKS = {'cls': ('tiny_s1l8', 128), 'mask-rcnn': ('tiny_s1l8', 2), 'fsdp': ('base_s1l20', 64)}
WAYS = ('eager', 'compiled', 'no replay')
STEPS = 20
#: relative 2-norms of the gradient's error: sums of two halves are not those of the whole
MAX_ERRORS = {'cls': 1e-4, 'fsdp': 1e-4, 'mask-rcnn': 1e-3}
#: images of a process for the gradients of cls and fsdp, in fp32
CHECKED = 8
SMALL = dict(embed_dims=16, depths=(1, 1, 1, 1))
NUMBERS = ('ms', 'alone_ms', 'images_s', 'peak_gib', 'grad_error')


class Case(NamedTuple):
    task: str
    way: str = 'eager'
    gpus: int = 1

    @property
    def model(self):
        return self.task

    @property
    def what(self):
        return f'{self.way}, {self.gpus} GPUs'


SHEET = Sheet(Case, NUMBERS, ('device', 'torch', 'shrink'))


# --- what is trained ------------------------------------------------------------------------

class Classification:
    """A classifier and its images. ``rank`` None: on one device, the images of all processes."""

    optimizer = torch.optim.AdamW

    def __init__(self, case, args, rank, batch):
        import timm  # noqa: F401  (the integration needs it)

        from vmamba_mm.timm import TimmVMamba

        arch, _ = TASKS[case.task]
        torch.manual_seed(0)
        with torch.device(args.device):
            self.model = TimmVMamba(dict(base=arch, **(SMALL if args.shrink > 1 else {})))
        ranks = range(case.gpus) if rank is None else [rank]
        side = max(32, 224 // args.shrink)
        made = [torch.Generator().manual_seed(100 + r) for r in ranks]
        self.images = torch.cat([torch.randn(batch, 3, side, side, generator=g) for g in made])
        self.labels = torch.cat([torch.randint(1000, (batch,), generator=g) for g in made])
        self.images, self.labels = self.images.to(args.device), self.labels.to(args.device)

    @property
    def blocks(self):
        return [block for stage in self.model.backbone.stages for block in stage.blocks]

    def compile(self, case):
        for module in self.blocks if case.task == 'fsdp' else [self.model]:
            module.compile(dynamic=False)

    def wrap(self, case, device, rank):
        if case.task == 'fsdp':
            shard(self.model, init_device_mesh(device, (case.gpus,)), whole_below=2**15)
            self.optimizer = on_shards(self.optimizer)
        else:
            self.model = DistributedDataParallel(
                self.model, device_ids=[rank] if device == 'cuda' else None, **cli.DDP_OPTIONS)
            share_buckets(self.model)

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.images).float(), self.labels)

    def make_step(self, device):
        optimizer = self.optimizer(self.model.parameters(), lr=1e-3, fused=device == 'cuda')

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = self.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


class Detection:
    """Mask R-CNN of our config and its annotated images."""

    def __init__(self, case, args, rank, batch):
        from mmengine.registry import MODELS, init_default_scope

        cfg, _, height, width = dense_steps.make_config('mask-rcnn', TASKS['mask-rcnn'][0],
                                                        args.shrink)
        cfg.model.backbone.drop_path_rate = 0.0
        if args.shrink > 1:
            cfg.model.backbone.arch = dict(base='tiny_s1l8', **SMALL)
            cfg.model.neck.in_channels = [SMALL['embed_dims'] * 2**i for i in range(4)]
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        self.cfg, self.model = cfg, MODELS.build(cfg.model)
        self.model.init_weights()
        self.model.to(args.device).train()
        self.device, self.sizes, self.batch = args.device, (height, width), batch
        self.ranks = range(case.gpus) if rank is None else [rank]

    def wrap(self, case, device, rank):
        from vmamba_mm.mm.wrappers import BucketSharingDDP
        self.model = BucketSharingDDP(
            self.model, device_ids=[rank] if device == 'cuda' else None, **cli.DDP_OPTIONS)

    def data_of(self, rank):
        rng = np.random.default_rng(100 + rank)
        height, width = self.sizes
        images = torch.from_numpy(rng.integers(0, 256, (self.batch, 3, height, width), np.uint8))
        return dict(inputs=list(images.to(self.device)), data_samples=[
            dense_steps.make_detection(rng, height, width).to(self.device)
            for _ in range(self.batch)])

    def loss(self):
        """The mean of the ranks' losses, each with the regions that its own process samples."""
        module = getattr(self.model, 'module', self.model)
        losses = []
        for rank in self.ranks:
            data = module.data_preprocessor(self.data_of(rank), True)
            torch.manual_seed(rank)
            losses.append(module.parse_losses(self.model(**data, mode='loss'))[0])
        return sum(losses) / len(losses)

    def make_step(self, device):
        from mmengine.optim import build_optim_wrapper

        settings = copy.deepcopy(self.cfg.optim_wrapper)
        settings.type = 'AmpOptimWrapper' if device == 'cuda' else 'OptimWrapper'
        wrapper = build_optim_wrapper(self.model, settings)
        data, model = self.data_of(self.ranks[0]), self.model
        return lambda: model.train_step(dict(data), wrapper)


def make_subject(case, args, rank=None, batch=None):
    kind = Detection if case.task == 'mask-rcnn' else Classification
    return kind(case, args, rank, batch or batch_of(case, args))


def batch_of(case, args):
    return 2 if args.shrink > 1 else TASKS[case.task][1]


# --- one process ----------------------------------------------------------------------------

@contextlib.contextmanager
def exact_products():
    """fp32 without TF32."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [f.allow_tf32 for f in flags]
    for f in flags:
        f.allow_tf32 = False
    yield
    for f, value in zip(flags, before, strict=True):
        f.allow_tf32 = value


def check_gradients(case, args, rank):
    """The relative error of the processes' gradient; only the first process compares."""
    batch = batch_of(case, args) if case.task == 'mask-rcnn' else min(CHECKED,
                                                                      batch_of(case, args))
    with exact_products():
        subject = make_subject(case, args, rank, batch)
        if case.way == 'compiled':
            subject.compile(case)
        subject.wrap(case, args.device, rank)
        for _ in range(4):  # from the third on blocks are replayed
            subject.model.zero_grad(set_to_none=True)
            subject.loss().backward()
        found = torch.cat([full(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                           for p in subject.model.parameters()])
        del subject
        release(args)
        error = 0.0
        if rank == 0:
            whole = make_subject(case, args, None, batch)
            whole.loss().backward()
            error = distance([found], [flat_grad(whole.model).cpu()])
            del whole
    release(args)
    dist.barrier()
    return error


def full(tensor):
    """The whole of a tensor of which FSDP2 holds a part here."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def check_parameters(subject, start):
    """Raise UserError unless the parameters have moved and are equal on all processes."""
    params = torch.cat([full(p.detach()).flatten() for p in subject.model.parameters()])
    first = params.clone()
    dist.broadcast(first, 0)
    same = torch.tensor(int(torch.equal(first, params)), device=params.device)
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if not same:
        raise UserError('the parameters differ between the processes after the training steps')
    if not params.isfinite().all() or torch.equal(params, start):
        raise UserError('the parameters are not finite, or no step has moved them')


def time_steps(step, args):
    """ms of a step of the slowest process."""
    groups, in_a_row = (3, 5) if args.quick else (10, 10)
    if args.device == 'cpu':
        groups, in_a_row = 2, 1
    times = []
    for _ in range(groups):
        synchronize(args)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(in_a_row):
            step()
        synchronize(args)
        spent = torch.tensor((time.perf_counter() - start) / in_a_row * 1e3, device=args.device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        times.append(spent.item())
    return statistics.median(times)


def time_alone(case, args, rank):
    """ms of a step of the slowest process, where each trains a model of its own."""
    subject = make_subject(case, args, rank)
    if case.way == 'compiled':
        subject.compile(case)
    step = subject.make_step(args.device)
    warm_up(step, args)
    ms = time_steps(step, args)
    del subject, step
    release(args)
    return ms


def warm_up(step, args):
    for _ in range(STEPS if args.device == 'cuda' else 3):
        step()


def synchronize(args):
    if args.device == 'cuda':
        torch.cuda.synchronize()


def release(args):
    gc.collect()
    if args.device == 'cuda':
        torch.cuda.empty_cache()


def work(rank, case, args, folder):
    """Check and time a case as one of its processes; the first one writes the numbers."""
    if args.device == 'cuda':
        torch.cuda.set_device(rank)
    if case.task == 'mask-rcnn':
        dense_steps.prepare_packages()
    dist.init_process_group('nccl' if args.device == 'cuda' else 'gloo', rank=rank,
                            world_size=case.gpus, init_method=f'file://{folder}/store')
    try:
        numbers = measure(rank, case, args)
        release(args)
        dist.barrier()  # a process that ends while another still talks to it aborts that one
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, 'numbers.json').write_text(json.dumps(numbers))


def measure(rank, case, args):
    numbers = dict.fromkeys(NUMBERS, NAN)
    if case.gpus > 1:
        error = numbers['grad_error'] = check_gradients(case, args, rank)
        if not error <= MAX_ERRORS[case.task]:
            raise UserError(f"the gradient is {error:.1e} from one GPU's (relative 2-norm), "
                            f'allowed {MAX_ERRORS[case.task]:.0e}')
        numbers['alone_ms'] = time_alone(case, args, rank)
    subject = make_subject(case, args, rank)
    if case.way == 'compiled':
        subject.compile(case)
    if case.gpus > 1:
        subject.wrap(case, args.device, rank)
    start = torch.cat([full(p.detach()).flatten() for p in subject.model.parameters()])
    step = subject.make_step(args.device)
    warm_up(step, args)
    check_parameters(subject, start)
    del start
    release(args)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    ms = numbers['ms'] = time_steps(step, args)
    numbers['images_s'] = case.gpus * batch_of(case, args) / ms * 1e3
    if args.device == 'cuda':
        numbers['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


# --- all cases ------------------------------------------------------------------------------

def run_case(case, args):
    """Its numbers, by as many new processes as it has GPUs.

    Raises:
        UserError: if a process fails.
    """
    os.environ['VMAMBA_MM_GRAPHS'] = '0' if case.way == 'no replay' else '1'
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # as torchrun does
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(work, (case, args, folder), nprocs=case.gpus)
        except (ProcessRaisedException, ProcessExitedException) as err:
            last = str(err).strip().splitlines()[-1]
            raise UserError(f'{case.task}, {case.what}: {last}') from err
        return json.loads(Path(folder, 'numbers.json').read_text())


def print_report(rows):
    for task, (arch, batch) in TASKS.items():
        lines = []
        for case in (case for case in rows if case.task == task):
            row = rows[case]
            single = rows.get(case._replace(gpus=1))
            efficiency = row['images_s'] / single['images_s'] / case.gpus if single else NAN
            lines.append([case.way, str(case.gpus), show_in('.1f', row['ms']),
                          show_in('.1f', row['alone_ms']) if case.gpus > 1 else '',
                          show_in(',.0f', row['images_s']),
                          show_in('.3f', efficiency) if case.gpus > 1 else '',
                          show_in('.2f', row['peak_gib']), show_in('.1e', row['grad_error'])])
        if lines:
            print_table(f'{task}: {arch}, {batch} images a GPU',
                        ['', 'GPUs', 'ms', 'alone', 'images/s', 'efficiency', 'peak GiB',
                         'gradient error'], lines)


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, metavar='TASK',
                        help=f'{", ".join(TASKS)} (default: all; none with --merge)')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, metavar='WAY',
                        help=f'{", ".join(map(repr, WAYS))} (default: all)')
    parser.add_argument('--gpus', nargs='+', type=int, default=[1, 2], metavar='N',
                        help='numbers of GPUs, or of processes with --device cpu (default: 1 2)')
    add_run_options(parser, 'sides of images by N, 2 images and a small model, to try the tool out')
    args = parser.parse_args()
    args.tasks = check_run_options(args, args.tasks, tuple(TASKS), '--device cpu --shrink 16')
    if min(args.gpus) < 1:
        raise UserError(f'--gpus must be at least 1, got {min(args.gpus)}')
    if args.tasks and args.device == 'cuda' and max(args.gpus) > torch.cuda.device_count():
        raise UserError(f'--gpus asks for {max(args.gpus)} GPUs, torch finds '
                        f'{torch.cuda.device_count()} here')
    return args


def main():
    args = parse_args()
    rows = {}
    for path in args.merge:
        rows |= SHEET.read(path)
    setting = dict(device=device_name(args.device), torch=torch.__version__,
                   shrink=str(args.shrink)) if args.tasks else SHEET.find_setting(rows)
    SHEET.find_setting({**rows, None: setting})
    print(f'{setting["device"]}; torch {setting["torch"]}')
    for case in (Case(task, way, gpus) for task in args.tasks for way in args.ways
                 if task != 'mask-rcnn' or way != 'compiled' for gpus in sorted(set(args.gpus))):
        start = time.monotonic()
        rows[case] = {**run_case(case, args), 'problem': '', **setting}
        if args.csv:
            SHEET.write(args.csv, rows)
        print(f'  {case.task}, {case.what}: {rows[case]["ms"]:.1f} ms '
              f'[{time.monotonic() - start:.0f} s]', file=sys.stderr, flush=True)
    print_report(rows)


if __name__ == '__main__':
    cli.run(main)
