"""The mixer of Mamba between its outer projections on a CPU: mamba_inner and what it replaces.

Three ways take turns, in fp32: the published pipeline in plain PyTorch, with a loop over positions,
all decays in memory, and one direction on the flipped sequence; the same with this package's
causal_conv and selective_scan; and mamba_inner. Results and all gradients are compared first, and a
wrong one ends the run. The median round counts. Memory is what a fresh process holds at most in a
forward and backward, above what it held before.

Example: python tools/bench/mamba_cpu.py --threads 2
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from ways import run, worst_error

import vmamba_mm
from vmamba_mm.mm.measuring import cpu_name
from vmamba_mm.ops import causal_conv, mamba_inner, selective_scan
from vmamba_mm.testing import mamba_inner_inputs

#: (batch, directions, D, L, N, R): Vim-T and Vim-S at 224, Mamba-130m, a long sequence.
SHAPES = ((8, 2, 384, 197, 16, 12), (8, 2, 768, 197, 16, 24), (1, 1, 1536, 2048, 16, 48),
          (1, 2, 384, 4096, 16, 12))
LIMIT = 1e-4


def by_loop(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D):
    """What the published code comes to where its kernels are not there."""
    total = 0
    for k in range(len(A)):
        x, z = (xz.flip(1) if k else xz).transpose(1, 2).chunk(2, dim=1)
        u = F.conv1d(x, conv_weight[k][:, None], conv_bias[k], groups=x.shape[1],
                     padding=conv_weight.shape[2] - 1)[..., :x.shape[2]]
        u = F.silu(u)
        dt, B, C = project(u.transpose(1, 2), x_proj[k], dt_proj[k])
        delta = F.softplus((dt + dt_bias[k]).transpose(1, 2))
        decays = torch.exp(torch.einsum('bdl,dn->bdln', delta, A[k]))
        drives = torch.einsum('bdl,bln,bdl->bdln', delta, B, u)
        h, ys = torch.zeros_like(drives[:, :, 0]), []
        for a, b, c in zip(decays.unbind(2), drives.unbind(2), C.unbind(1), strict=True):
            h = a * h + b
            ys.append(torch.einsum('bdn,bn->bd', h, c))
        y = (torch.stack(ys, dim=1) + u.transpose(1, 2) * D[k]) * F.silu(z.transpose(1, 2))
        total = total + (y.flip(1) if k else y)
    return total


def by_ops(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D):
    total = 0
    x, z = xz.chunk(2, dim=-1)
    for k in range(len(A)):
        u = causal_conv(x, conv_weight[k], conv_bias[k], reverse=k == 1)
        tokens = u, *project(u, x_proj[k], dt_proj[k])
        u, dt, B, C = (t.transpose(1, 2) for t in tokens)
        total = total + selective_scan(
            u, dt, A[k], B[:, None], C[:, None], D[k], z=z.transpose(1, 2), delta_bias=dt_bias[k],
            delta_softplus=True, reverse=k == 1)
    return total.transpose(1, 2)


def project(u, x_proj, dt_proj):
    """dt before its bias (B, L, D), B and C (B, L, N)."""
    rank = dt_proj.shape[1]
    state = (len(x_proj) - rank) // 2
    dt, B, C = F.linear(u, x_proj).split((rank, state, state), dim=-1)
    return F.linear(dt, dt_proj), B, C


WAYS = {'loop over positions': by_loop, 'causal_conv, selective_scan': by_ops,
        'mamba_inner': mamba_inner}


def verify(shape) -> float:
    """The largest relative error of the ways beside the loop in fp64, at a part of the length."""
    batch, routes, dim, length, state, rank = shape
    inputs = mamba_inner_inputs(1, routes, dim, min(length, 50), state, rank)
    return worst_error(WAYS.values(), by_loop, inputs)


def time_in_turns(inputs, with_backward: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    seconds = {name: [] for name in WAYS}
    for i in range(rounds + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            run(way, inputs, with_backward)
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def peak_mib(index: int, args: argparse.Namespace, way: str) -> float:
    """Of a forward and backward of a shape, in a process of its own."""
    command = [sys.executable, __file__, '--memory-of', str(index), way, '--threads',
               str(args.threads), '--shrink', str(args.shrink)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'measuring the memory of {way} failed:\n{done.stderr}')
    return float(done.stdout.split()[-1])


def measure_memory(shape, way: str) -> None:
    run(WAYS[way], mamba_inner_inputs(1, 2, 8, 9, 4, 2), with_backward=True)  # loads what it needs
    inputs = mamba_inner_inputs(*shape)
    before = high_water_mib()
    run(WAYS[way], inputs, with_backward=True)
    print(high_water_mib() - before)


def high_water_mib() -> float:
    # Not getrusage: its maximum is inherited from the parent process.
    line = next(line for line in Path('/proc/self/status').read_text().splitlines()
                if line.startswith('VmHWM'))
    return int(line.split()[1]) / 2 ** 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--shrink', type=int, default=1, metavar='N',
                        help='divide D and L by N, to try the tool out')
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = [(b, k, max(1, d // args.shrink), max(1, length // args.shrink), n, r)
              for b, k, d, length, n, r in SHAPES]
    if args.memory_of:
        index, way = args.memory_of
        measure_memory(shapes[int(index)], way)
        return
    print(f'{platform.processor() or platform.machine()} ({cpu_name()}), {args.threads} threads, '
          f'fp32, eager; torch {torch.__version__}, vmamba_mm {vmamba_mm.__version__}')
    worst = max(map(verify, shapes))
    print(f'results and gradients beside the loop in fp64: relative error {worst:.1e} '
          f'(allowed {LIMIT:.0e})', flush=True)
    if not worst <= LIMIT:
        sys.exit('A result is wrong; nothing was timed.')
    for i, shape in enumerate(shapes):
        inputs = mamba_inner_inputs(*shape)
        print('batch {}, directions {}, D {}, L {}, N {}'.format(*shape))
        times = [time_in_turns(inputs, with_backward, args.rounds)
                 for with_backward in (False, True)]
        for name in WAYS:
            forward, both = (t[name] for t in times)
            print(f'  {name:28s} forward {forward:8.1f} ms, with backward {both:8.1f} ms '
                  f'({forward / times[0]["mamba_inner"]:5.2f} and '
                  f'{both / times[1]["mamba_inner"]:5.2f} times mamba_inner), '
                  f'{peak_mib(i, args, name):6.0f} MiB', flush=True)


if __name__ == '__main__':
    main()
