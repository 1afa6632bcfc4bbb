"""Where the time of a model's forward goes on a GPU, kernel by kernel, and by kind of kernel.

Models and checks are those of end_to_end.py: fp16 autocast, eager, a batch of images of one size;
the output is checked first. Of several sizes the last table has the time by pixel, each kind's
beside that of the first size.

The profiler adds up what the kernels take; what they wait for each other, or for Python, is not in
it.
"""

import argparse
import csv
import re

import end_to_end
import torch
from end_to_end_report import Case

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = '''  python tools/bench/profile_forward.py
  python tools/bench/profile_forward.py --model convnext_t --batch 128 --size 224 --csv kernels.csv
  python tools/bench/profile_forward.py --device cpu --batch 2 --size 64'''
#: The first that a kernel's name (on a CPU an operator's) contains.
KINDS = {'copies, casts, layout': 'copy|CatArray|transpose|nchwToNhwc|nhwcToNchw|Memcpy|_to_copy|'
                                  'contiguous|im2col',
         'scan': r'ss2d_scan|\bscan_fwd|scan_combine|selective_scan',
         'merge and norm of the scan': 'ss2d_merge',
         'parameters prepared': r'ss2d_prepare|\bscan_prepare|\bcast<',
         'norms and residual sums': 'add_norm|layer_norm|LayerNorm',
         'depthwise convolution': 'dwconv|depthwise|DepthWise',
         'convolutions': 'fprop|conv|winograd',
         'matrix products, attention': 'nvjet|gemm|cutlass|cublas|flash|fmha|addmm|::mm|::bmm|'
                                       'matmul',
         'elementwise': 'elementwise|gelu|silu|reduce_kernel|::mean|::add|::mul|softmax',
         'memory set': 'Memset|fill_|zero_',
         'other': ''}
COPIES = next(iter(KINDS))
PASSES = 3


def kind_of(name):
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def profile(function, on_gpu):
    """{name: (us a call, launches a call)}, of the operators on a CPU."""
    activity = torch.profiler.ProfilerActivity
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    function()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        for _ in range(PASSES):
            function()
        if on_gpu:
            torch.cuda.synchronize()
    time = 'self_device_time_total' if on_gpu else 'self_cpu_time_total'
    return {event.key: (getattr(event, time) / PASSES, event.count / PASSES)
            for event in profiler.key_averages()
            if event.device_type == device and not event.is_user_annotation}


def by_kind(kernels):
    """{kind: us}, all kinds."""
    us_of = dict.fromkeys(KINDS, 0.0)
    for name, (us, _) in kernels.items():
        us_of[kind_of(name)] += us
    return us_of


def short(name, width=76):
    name = re.sub(r'\bvoid |at::native::|\(anonymous namespace\)::', '', name)
    return name if len(name) <= width else name[:width - 3] + '...'


def show(case, kernels, least):
    total = sum(us for us, _ in kernels.values())
    print(f'\n{case.batch} images of {case.height}x{case.width}: {total / 1e3:.3f} ms\n'
          f'{"us":>9} {"launches":>9} {"share":>7}  kernel')
    for name, (us, count) in sorted(kernels.items(), key=lambda item: -item[1][0]):
        if us >= least * total:
            print(f'{us:9.1f} {count:9.0f} {us / total:7.1%}  {short(name)}')
    copies = by_kind(kernels)[COPIES] / total
    print(f'{COPIES}: {copies:.2%}')


def show_kinds(kernels_of):
    """Print the ns by pixel of each kind, and beside them those of the first size."""
    sizes = [f'{case.batch} x {case.height}x{case.width}' for case in kernels_of]
    pixels = [case.batch * case.height * case.width for case in kernels_of]
    kinds = [by_kind(kernels) for kernels in kernels_of.values()]
    print(f'\n{"ns by pixel":28}' + ''.join(f'{size:>16}{"":8}' for size in sizes))
    for kind in (*KINDS, 'all'):
        values = [1e3 * (sum(us_of.values()) if kind == 'all' else us_of[kind]) / n
                  for us_of, n in zip(kinds, pixels, strict=True)]
        if any(values):
            cells = (f'{value:16.3f}' + (f'{value / values[0]:7.2f}x' if values[0] else f'{"":8}')
                     for value in values)
            print(f'{kind:28}' + ''.join(cells))


def write(path, kernels_of):
    with open(path, 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(('batch', 'height', 'width', 'kind', 'us', 'launches', 'kernel'))
        rows.writerows((case.batch, case.height, case.width, kind_of(name), us, count, name)
                       for case, kernels in kernels_of.items()
                       for name, (us, count) in kernels.items())


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--model', choices=end_to_end.MODELS, default='tiny_s1l8', metavar='MODEL',
                        help=f'{", ".join(end_to_end.MODELS)} (default: tiny_s1l8)')
    parser.add_argument('--batch', type=int, nargs='+', default=[64, 4], metavar='N',
                        help='images, one number for each size (default: 64 4)')
    parser.add_argument('--size', type=int, nargs='+', default=[224, 1024], metavar='PIXELS',
                        help='sides of the images, multiples of 32 (default: 224 1024)')
    parser.add_argument('--least', type=float, default=0.005, metavar='SHARE',
                        help='of the time, of a kernel that is shown (default: 0.005)')
    parser.add_argument('--dtype', choices=('float16', 'bfloat16'), default='float16')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--csv', metavar='FILE', help='write all kernels there')
    parser.add_argument('--traceback', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.batch) != len(args.size):
        raise UserError(f'--batch has {len(args.batch)} number(s) and --size '
                        f'{len(args.size)}; give as many')
    if min(args.batch) < 1 or any(size < 32 or size % 32 for size in args.size):
        raise UserError('--batch must be at least 1 and --size a multiple of 32')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch finds no GPU here; --device cpu --batch 2 --size 64 tries the '
                        'tool out')
    return args


def main():
    args = parse_args()
    on_gpu = args.device == 'cuda'
    args.dtype, args.shrink = getattr(torch, args.dtype), 1
    torch.backends.cudnn.benchmark = True
    device = torch.cuda.get_device_name() if on_gpu else 'CPU: operators, not kernels'
    print(f'{args.model}; {device}; torch {torch.__version__}; {args.dtype} autocast, eager')
    kernels_of = {}
    for batch, size in zip(args.batch, args.size, strict=True):
        case = Case(args.model, batch=batch, height=size, width=size)
        subject = end_to_end.make_subject(case.model, case.output, batch, size, size, args.device)
        forward, _ = end_to_end.make_inference(case, subject, args)
        for _ in range(end_to_end.WARM_UP):
            forward()
        kernels_of[case] = profile(forward, on_gpu)
        show(case, kernels_of[case], args.least)
    show_kinds(kernels_of)
    if args.csv:
        write(args.csv, kernels_of)


if __name__ == '__main__':
    cli.run(main)
