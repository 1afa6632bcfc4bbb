"""Speed and memory of whole models beside their peers in timm, in one run on one GPU.

It prints the ratios to the peers, then numbers of others on an H100, then every number. Before an
architecture of ours is timed, what is timed is checked at its own size: the output for the first
and the last image (the last alone above 512x512), and in training up to there the gradient of the
parameters by them, against the same model in fp32 on the CPU, where all of it is plain PyTorch.
What is wrong ends the run.

All models: the same images, dtype, drop path 0, cudnn.benchmark, PyTorch's defaults for TF32, and
the layout that suits them. "autocast" has fp32 parameters, "pure" half-precision ones. The peak
memory of forward+backward has parameters and the gradients of the step before in it. "maps" are
the four outputs of the backbone as a detector reads them; a peer's lack the norms of ours.

Sections: GPU time is dear, so each is a run of its own, and --merge shows them together.
  headline            tiny models, batch 128, eager: inference and forward+backward
  archs               the nine architectures and Swin and ConvNeXt, small and base, likewise
  batch1              tiny models, one image of 224, 512, 800x1280: eager and as a CUDA graph
  resolutions         tiny models from 224 (batch 64) to 1024 (batch 4)
  compiled-inference  torch.compile, batch 128, half-precision parameters
  compiled-training   torch.compile, batch 128, autocast
  max-autotune        both by torch.compile's mode of that name, CUDA graphs included
  vim                 Vim and DeiT of the same widths, batch 128, eager: forward+backward, inference
  vim-pure            the same with half-precision parameters
  vim-compiled        the same by torch.compile, in both precisions
  vim-published       the first and the second with Vim's mixer step by step, as published
  vssd                VSSD tiny, the same in plain PyTorch as published, and ConvNeXt-T, batch 128,
                      eager: forward+backward and inference, autocast and half-precision parameters
  vssd-compiled       the same by torch.compile
  rmt, rmt-compiled   likewise RMT small, the same as published, and DeiT small
  mila, mila-compiled, ravlt, ravlt-compiled
                      likewise MILA tiny and ConvNeXt-T, and RAVLT small and DeiT small
  vrwkv, vrwkv-compiled
                      likewise Vision-RWKV small, whose published form has our WKV
"""

import copy
import functools
import gc
import math
import sys
import time
import traceback

import end_to_end_report as report
import timm
import torch
from bench_options import add_run_options, check_run_options
from bench_report import NAN, describe_tf32, device_name
from end_to_end_models import MODELS, layout_of, make_model
from end_to_end_report import OURS, RESOLUTIONS, Case
from ss2d_gpu import graphed
from torch.nn.modules.batchnorm import _BatchNorm
from vim_models import PUBLISHED, VIMS, publish

import vmamba_mm
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, measuring
from vmamba_mm.mm.measuring import WARM_UP

EXAMPLES = '''  python tools/bench/end_to_end.py --sections headline batch1 --csv a.csv
  python tools/bench/end_to_end.py --sections vim vim-published --csv vim.csv
  python tools/bench/end_to_end.py --sections compiled-training --models tiny_s1l8 --csv b.csv
  python tools/bench/end_to_end.py --merge a.csv b.csv --csv all.csv --png all.png
  python tools/bench/end_to_end.py --device cpu --shrink 16 --models tiny_s1l8 swin_t'''
#: relative 2-norms of the output's error and of the gradient's; bf16 has an eighth of the digits
MAX_ERRORS = {torch.float16: (2e-2, 5e-2), torch.bfloat16: (6e-2, 1.5e-1)}
#: of an image whose gradient is checked too
FEW_PIXELS = 512 * 512
NO_GRAPHS = 'CUDA graphs need a GPU'
AUTOTUNED = 'max-autotune'


# --- sections -------------------------------------------------------------------------------
# Cases of one model and size follow one another, so that it is built once. Training comes first: to
# work out what it must give gives the outputs too. Half-precision parameters come last: they stay.

def headline(model):
    return [*archs(model), Case(model, precision='pure')]


def archs(model):
    return [Case(model, 'forward+backward'), Case(model)]


def batch1(model):
    cases = []
    for height, width, output in ((224, 224, 'logits'), (512, 512, 'logits'),
                                  (800, 1280, 'maps')):
        case = Case(model, batch=1, height=height, width=width, output=output)
        graph = case._replace(how='graph')
        cases += [case._replace(task='forward+backward'), case, graph]
        if height == 224:
            cases.append(graph._replace(precision='pure'))
    return cases


def resolutions(model):
    return [Case(model, batch=batch, height=side, width=side) for side, batch in RESOLUTIONS]


def compiled_inference(model):
    return [Case(model, how='compiled', precision='pure')]


def compiled_training(model):
    return [Case(model, 'forward+backward', 'compiled')]


def autotuned(model):
    return [Case(model, 'forward+backward', AUTOTUNED),
            Case(model, how=AUTOTUNED, precision='pure')]


def pure(model):
    return [case._replace(precision='pure') for case in archs(model)]


def vim_compiled(model):
    return [case._replace(how='compiled') for case in (*archs(model), *pure(model))]


def published(model):
    return [*archs(model), *pure(model)]


THREE = ('tiny_s1l8', 'swin_t', 'convnext_t')
VSSD_PEERS = ('vssd_tiny', 'published_vssd_tiny', 'convnext_t')
RMT_PEERS = ('rmt_small', 'published_rmt_small', 'deit_s')
MILA_PEERS = ('mila_tiny', 'published_mila_tiny', 'convnext_t')
RAVLT_PEERS = ('ravlt_small', 'published_ravlt_small', 'deit_s')
VRWKV_PEERS = ('vision_rwkv_small', 'published_vision_rwkv_small', 'deit_s')
WIDTHS = ('vim_tiny', 'deit_t', 'vim_small', 'deit_s', 'vim_base', 'deit_b')
SECTIONS = {'headline': (headline, report.TINY),
            'archs': (archs, (*report.VMAMBAS, 'swin_s', 'convnext_s', 'swin_b', 'convnext_b')),
            'batch1': (batch1, (*THREE, 'deit_s')),
            'resolutions': (resolutions, THREE),
            'compiled-inference': (compiled_inference, THREE),
            'compiled-training': (compiled_training, THREE),
            'max-autotune': (autotuned, THREE),
            'vim': (archs, WIDTHS),
            'vim-pure': (pure, WIDTHS),
            'vim-compiled': (vim_compiled, WIDTHS),
            'vim-published': (published, tuple(PUBLISHED)),
            'vssd': (published, VSSD_PEERS),
            'vssd-compiled': (vim_compiled, VSSD_PEERS),
            'rmt': (published, RMT_PEERS),
            'rmt-compiled': (vim_compiled, RMT_PEERS),
            'mila': (published, MILA_PEERS),
            'mila-compiled': (vim_compiled, MILA_PEERS),
            'ravlt': (published, RAVLT_PEERS),
            'ravlt-compiled': (vim_compiled, RAVLT_PEERS),
            'vrwkv': (published, VRWKV_PEERS),
            'vrwkv-compiled': (vim_compiled, VRWKV_PEERS)}


# --- models ---------------------------------------------------------------------------------

def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def outputs(result):
    return list(result) if isinstance(result, list | tuple) else [result]


class Subject:
    """A model, its images, and what it must give for the first and the last of them."""

    def __init__(self, name, output, batch, height, width, device):
        self.name = name
        torch.manual_seed(0)
        with torch.device(device):
            model = make_model(name, output, height, width)
            images = torch.randn(batch, 3, height, width)
        layout = layout_of(name)
        self.model = model.to(device, memory_format=layout)
        for module in batch_norms(model):
            module.momentum = 0.0  # steps that are timed change nothing of what is expected
        self.images = images.contiguous(memory_format=layout)
        # The CPU needs seconds for a large image; the last one is furthest in memory.
        self.few = height * width <= FEW_PIXELS
        self.checked = sorted({0, batch - 1}) if self.few else [batch - 1]
        self.expected = self.expected_grad = self.cotangents = None

    def reference(self):
        """The model in fp32, where all of it is plain PyTorch: on the CPU. A large image takes
        a Vim minutes there, so that then it is on the GPU, its mixers op by op."""
        model = copy.deepcopy(self.model).float().eval()
        if self.name in VIMS and not self.few:
            return publish(model)
        return model.cpu()

    def work_out(self, training, dtype):
        """Sets what is expected, in fp32 on the CPU; once, as it takes the longest there."""
        training = training and self.few
        if self.expected_grad is not None or (self.expected is not None and not training):
            return
        model = self.reference()
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training):
            device = next(model.parameters()).device
            results = outputs(model(self.images[self.checked].float().to(device)))
        self.expected = [o.detach().cpu() for o in results]
        if training:
            self.cotangents = [torch.randn_like(o).to(dtype) for o in results]
            torch.autograd.backward(results, [c.float() for c in self.cotangents])
            self.expected_grad = flat_grad(model)


@functools.lru_cache(maxsize=1)
def make_subject(*args):
    return Subject(*args)


def flat_grad(model):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten().double().cpu() for grad in grads])


def distance(actual, expected):
    """Largest relative 2-norm of the differences of tensors; NaN if any has NaN."""
    errors = [((a.double().cpu() - b.double()).norm() / b.double().norm()).item()
              for a, b in zip(actual, expected, strict=True)]
    return NAN if any(map(math.isnan, errors)) else max(errors)


# --- measuring ------------------------------------------------------------------------------

def autocast(case, args):
    return torch.autocast(args.device, args.dtype, enabled=case.precision == 'autocast')


def median(function, args):
    return measuring.median(function, args.device == 'cuda', 100 if args.quick else 500)


def peak_gib(function, args):
    if args.device == 'cpu':
        return NAN
    return measuring.held_and_peak(function, on_gpu=True)[1] / 2**30


def check(case, what, error, limit):
    if not error <= limit:
        raise UserError(f'{case.model} is wrong, nothing more was timed: {case.what}: {what} '
                        f'differs from fp32 by {error:.1e} (relative 2-norm), allowed '
                        f'{limit:.0e}')


def measure(case, args):
    """{number: value} of a case; an architecture of ours is checked first.

    Raises:
        UserError: if its results are wrong.
    """
    subject = make_subject(case.model, case.output, *shrunk(case, args.shrink), args.device)
    numbers = dict.fromkeys(report.NUMBERS, NAN)
    if case.precision == 'pure':
        if case.model in OURS:
            # while the parameters have all their digits
            subject.work_out(case.task != 'inference', args.dtype)
        make_subject.cache_clear()
        subject.model.to(args.dtype)
        subject.images = subject.images.to(args.dtype)
    if case.task == 'inference':
        timed, error = make_inference(case, subject, args)
        numbers['error'] = error
    else:
        timed, numbers['error'], numbers['grad_error'] = make_training(case, subject, args)
    numbers['ms'] = median(timed, args)
    numbers['images_per_s'] = len(subject.images) / numbers['ms'] * 1e3
    if case.how not in ('graph', AUTOTUNED):  # whose memory lies in a pool of its own
        if case.task == 'inference':
            numbers['peak_gib'] = peak_gib(timed, args)
        else:
            numbers['peak_gib'] = peak_gib(functools.partial(timed, keep=True), args)
    return numbers


def compiled(model, case):
    if case.how not in ('compiled', AUTOTUNED):
        return model
    mode = AUTOTUNED if case.how == AUTOTUNED else None
    return torch.compile(model, dynamic=False, mode=mode)


def make_inference(case, subject, args):
    """The function to time, and the error of its output."""
    model = subject.model.eval()
    model.zero_grad(set_to_none=True)  # left by training
    called = compiled(model, case)
    held = {}

    def forward():
        torch.compiler.cudagraph_mark_step_begin()
        held.clear()  # or the last outputs would count in the peak memory
        with torch.inference_mode(), autocast(case, args):
            held['outputs'] = outputs(called(subject.images))

    if case.how == 'graph':
        for _ in range(WARM_UP):  # a capture finds the libraries' choices made
            forward()
        forward = graphed(forward)
    forward()
    error = NAN
    if case.model in OURS:
        subject.work_out(False, args.dtype)
        error = distance([o[subject.checked] for o in held['outputs']], subject.expected)
        check(case, 'the output', error, MAX_ERRORS[args.dtype][0])
    return forward, error


def make_training(case, subject, args):
    """The function to time, the errors of its output and of the parameters' gradient."""
    model = subject.model.train()
    called = compiled(model, case)
    held = []

    def step(keep=False, cotangents=None):
        torch.compiler.cudagraph_mark_step_begin()
        if not keep:
            model.zero_grad(set_to_none=True)
        with autocast(case, args):
            results = outputs(called(subject.images))
        if not held:
            held.extend(torch.randn_like(o) for o in results)
        torch.autograd.backward(results, cotangents or held)
        return results

    if case.model not in OURS:
        step()
        return step, NAN, NAN
    if batch_norms(model):
        model.eval()  # what must come out does not depend on the other images then
    try:
        return step, *check_step(case, subject, step, held, args)
    finally:
        model.train()


def check_step(case, subject, step, held, args):
    """The errors of a step's output and of the parameters' gradient."""
    results = [o.detach()[subject.checked] for o in step()]
    subject.work_out(True, args.dtype)
    error = distance(results, subject.expected)
    check(case, 'the output', error, MAX_ERRORS[args.dtype][0])
    if subject.expected_grad is None:
        return error, NAN
    # No gradient by the other images, so that the parameters' is that of the checked ones.
    only = [torch.zeros_like(c) for c in held]
    for whole, few in zip(only, subject.cotangents, strict=True):
        whole[subject.checked] = few.to(whole)
    step(cotangents=only)
    grad_error = distance([flat_grad(subject.model)], [subject.expected_grad])
    check(case, "the parameters' gradient", grad_error, MAX_ERRORS[args.dtype][1])
    return error, grad_error


def shrunk(case, by):
    """(batch, height, width); sides stay multiples of 32."""
    return (max(1, case.batch // by),
            *(max(1, round(side / by / 32)) * 32 for side in (case.height, case.width)))


def attempt(case, args):
    """(numbers, problem): a model that fails is reported, one with wrong results ends the run."""
    nothing = dict.fromkeys(report.NUMBERS, NAN)
    if case.how == 'graph' and args.device == 'cpu':
        return nothing, NO_GRAPHS
    if case.how in ('compiled', AUTOTUNED):
        torch.compiler.reset()
    try:
        return measure(case, args), ''
    except UserError:
        raise
    except ModuleNotFoundError as err:
        problem = f'not installed ({err})'
    except Exception as err:
        problem = f'{type(err).__name__}: {" ".join(str(err).split())[:200]}'
        if case.model in OURS:
            traceback.print_exc()
    make_subject.cache_clear()
    return nothing, problem


def measure_all(cases, args, rows, setting):
    """Adds to ``rows``, and to the CSV file after each: a run may be cut off."""
    for case in cases:
        start = time.monotonic()
        numbers, problem = attempt(case, args)
        if args.device == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()
        rows[case] = {**numbers, 'problem': problem, **setting}
        result = problem or (f'{numbers["ms"]:.3f} ms, {numbers["images_per_s"]:.0f} images/s, '
                             f'{numbers["peak_gib"]:.2f} GiB')
        print(f'  {case.model}: {case.what}: {result} [{time.monotonic() - start:.0f} s]',
              file=sys.stderr, flush=True)
        if args.csv:
            report.SHEET.write(args.csv, rows)


def measure_sections(args, rows, setting):
    done = set()
    for section in args.sections:
        cases, models = SECTIONS[section]
        began = time.monotonic()
        cases = dict.fromkeys(case for model in args.models or models for case in cases(model))
        measure_all([case for case in cases if case not in done], args, rows, setting)
        done |= set(cases)
        print(f'{section}: {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)


# --- command line ---------------------------------------------------------------------------

def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, metavar='SECTION',
                        help=f'what to measure: {", ".join(SECTIONS)} (default: headline; nothing '
                        'with --merge)')
    parser.add_argument('--models', nargs='+', choices=MODELS, metavar='MODEL',
                        help=f"instead of the sections' own: {', '.join(MODELS)}")
    parser.add_argument('--dtype', choices=('float16', 'bfloat16'), default='float16')
    parser.add_argument('--png', metavar='FILE', help='draw them there')
    add_run_options(parser, 'batches and sides by N, to try the tool out where there is no GPU')
    args = parser.parse_args()
    args.sections = check_run_options(args, args.sections, ('headline',),
                                      '--device cpu --shrink 16')
    return args


def begin(args, measures):
    """The rows of --merge, the setting and a line about it; ``measures``: whether this run adds
    rows, for which it prints what is the same for all.

    Raises:
        UserError: if the rows are of different settings.
    """
    rows = {}
    for path in args.merge:
        rows |= report.SHEET.read(path)
    setting = dict(device=device_name(args.device), torch=torch.__version__,
                   timm=timm.__version__, dtype=args.dtype,
                   shrink=str(args.shrink)) if measures else report.SHEET.find_setting(rows)
    report.SHEET.find_setting({**rows, None: setting})
    args.dtype = getattr(torch, args.dtype)
    torch.backends.cudnn.benchmark = True
    title = (f'{setting["device"]}; {setting["dtype"]}; torch {setting["torch"]}, timm '
             f'{setting["timm"]}')
    if setting['shrink'] != '1':
        title += f'; every batch and side by {setting["shrink"]}: nothing to compare with'
    print(title)
    if measures:
        print(f'vmamba_mm {vmamba_mm.__version__}; the same for all models: drop path 0, '
              f'cudnn.benchmark on, {describe_tf32()}')
    sys.stdout.flush()
    return rows, setting, title


def fail_if_ours_did(rows):
    """Raise UserError if a model of ours did not run."""
    failed = sorted({case.model for case, row in rows.items()
                     if case.model in OURS and row['problem'] not in ('', NO_GRAPHS)})
    if failed:
        raise UserError(f'{", ".join(failed)} failed: see above')


def main():
    args = parse_args()
    rows, setting, title = begin(args, bool(args.sections))
    measure_sections(args, rows, setting)
    report.print_ratios(rows)
    report.print_anchors(rows)
    report.print_rows(rows)
    if args.csv:
        report.SHEET.write(args.csv, rows)
    if args.png:
        report.plot(rows, args.png, title)
    fail_if_ours_did(rows)


if __name__ == '__main__':
    cli.run(main)
