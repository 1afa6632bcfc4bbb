"""The ops wkv6 and wkv7: chunks in plain PyTorch, a loop over tokens, and flash-linear-attention.

Results and all gradients are compared first, with the loop in fp64, and a wrong one ends the run.
The kernels of flash-linear-attention, where fla-core is installed, run on a GPU alone; the loop, of
which nothing can be expected there, on a CPU alone. Times are medians; memory is what a forward and
backward take beyond their inputs.

Example: python tools/bench/rwkv_ops.py --dtype bf16
"""

import argparse
import functools
import platform
import sys

import torch
import torch.nn.functional as F
from ways import run, worst_error

import vmamba_mm
from vmamba_mm.mm.measuring import cpu_name, held_and_peak, median
from vmamba_mm.ops import wkv6, wkv7
from vmamba_mm.ops.matrix_wkv import fla

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
#: (batch, T, heads, N): of models with 768 and 2048 channels.
SHAPES = {'cpu': ((1, 1024, 12, 64),), 'cuda': ((8, 2048, 12, 64), (8, 4096, 32, 64))}
#: Of the largest number, beside that of fp64.
LIMITS = dict(fp32=1e-4, bf16=6e-2, fp16=1e-2)


def make(op, shape, dtype, device):
    """Of a model's size: slow decays, and for wkv7 a key of length 1 that is removed in part."""
    rng = torch.Generator().manual_seed(0)
    r, k, v, w, share = (torch.randn(*shape, generator=rng) for _ in range(5))
    inputs = dict(r=r, k=k, v=v, w=w - 3)
    if op is wkv6:
        inputs['u'] = torch.randn(*shape[2:], generator=rng)
    else:
        key = F.normalize(k, dim=-1)
        inputs.update(w=inputs['w'].clamp_max(-0.5), a=-key, b=key * share.sigmoid())
    return {name: t.to(device, dtype) for name, t in inputs.items()}


def ways_of(op, on_gpu):
    names = ['chunked', *(['fla'] if on_gpu and fla.is_installed() else []),
             *([] if on_gpu else ['reference'])]
    return {name: functools.partial(op, backend=name) for name in names}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=SHAPES, help='(default: cuda where there is a GPU)')
    parser.add_argument('--dtype', choices=DTYPES, help='(default: bf16 on a GPU, else fp32)')
    parser.add_argument('--shrink', type=int, default=1, metavar='N',
                        help='divide T and N by N, to try the tool out')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    on_gpu = device == 'cuda'
    name = args.dtype or ('bf16' if on_gpu else 'fp32')
    where = torch.cuda.get_device_name() if on_gpu else \
        f'{platform.processor() or platform.machine()} ({cpu_name()}), ' \
        f'{torch.get_num_threads()} threads'
    print(f'{where}, {name}, eager; torch {torch.__version__}, vmamba_mm {vmamba_mm.__version__}'
          + ('' if fla.is_installed() or not on_gpu else '; fla-core is not installed'))
    for op in (wkv6, wkv7):
        ways = ways_of(op, on_gpu)
        for batch, length, heads, size in SHAPES[device]:
            shape = batch, max(1, length // args.shrink), heads, max(1, size // args.shrink)
            small = make(op, (1, min(100, shape[1]), *shape[2:]), DTYPES[name], device)
            worst = worst_error(ways.values(), functools.partial(op, backend='reference'), small)
            print('{}, batch {}, T {}, heads {}, N {}'.format(op.__name__, *shape)
                  + f': relative error {worst:.1e} (allowed {LIMITS[name]:.0e})', flush=True)
            if not worst <= LIMITS[name]:
                sys.exit('A result is wrong; nothing more is timed.')
            inputs = make(op, shape, DTYPES[name], device)
            for label, way in ways.items():
                forward, both = (median(functools.partial(run, way, inputs, backward), on_gpu)
                                 for backward in (False, True))
                bounds = held_and_peak(functools.partial(run, way, inputs, True), on_gpu)
                memory = 'unknown' if bounds is None \
                    else f'{(bounds[1] - bounds[0]) / 2 ** 20:.0f} MiB'
                print(f'  {label:10s} forward {forward:8.2f} ms, with backward {both:8.2f} ms, '
                      f'{memory}', flush=True)


if __name__ == '__main__':
    main()
