"""The middle of SS2D along eight routes beside four, on a GPU: correctness, speed, memory.

From SiLU to the output of the norm, fp16 maps and fp32 parameters, as under autocast. Each pattern
is checked first, at the size that is timed: the map and every gradient against fp64, with at most
twice the error of plain PyTorch on the same map. What is wrong is not timed, and ends with 1.
"""

import argparse
import sys
from typing import NamedTuple

import torch

from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.ops import scan_norm
from vmamba_mm.ops.ss2d_scan.patterns import num_routes
from vmamba_mm.testing import relative_error, ss2d_scan_inputs, with_grads

PATTERNS = 'cross', 'omnidirectional', 'omnidirectional-unwrapped'
FLOOR = 4e-3  # relative error of fp16 that plain PyTorch may stay below by chance


class Row(NamedTuple):
    name: str
    batch: int
    dim: int
    height: int
    width: int
    state: int
    rank: int


ROWS = [Row('96 channels, 256x256', 8, 96, 256, 256, 16, 6),
        Row('stage 1 of a 256x256 image', 8, 192, 64, 64, 16, 6),
        Row('stage 3 of a 1024x1024 image', 2, 768, 64, 64, 16, 24)]


def make(row, scan):
    batch, dim, height, width = row[1:5]
    inputs = ss2d_scan_inputs(batch, dim, height, width, state=row.state, rank=row.rank,
                              routes=num_routes(scan), device='cuda')
    inputs['x'] = inputs['x'].half()
    rng = torch.Generator('cuda').manual_seed(1)
    norm = torch.rand(2, dim, generator=rng, device='cuda') + 0.5
    return inputs | dict(norm_weight=norm[0], norm_bias=norm[1])


def is_right(inputs, scan):
    exact, exact_grads = with_grads(scan_norm, {k: t.double() for k, t in inputs.items()},
                                    scan=scan, backend='chunked')
    plain, plain_grads = with_grads(scan_norm, inputs, scan=scan, backend='chunked')
    found, grads = with_grads(scan_norm, inputs, scan=scan)
    pairs = {'y': (found, plain, exact)} | {
        name: (grad, plain_grads[name], exact_grads[name]) for name, grad in grads.items()}
    wrong = [f'{name} {relative_error(ours, true):.1e}'
             for name, (ours, theirs, true) in pairs.items()
             if not relative_error(ours, true) <= 2 * max(FLOOR, relative_error(theirs, true))]
    verdict = f'errors of {", ".join(wrong)}' if wrong else 'map and gradients are right'
    print(f'  {scan}: {verdict}')
    return not wrong


def measure(inputs, scan):
    """ms of a forward, of a training step, and its peak memory in bytes."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    grad_y = torch.randn_like(inputs['x'])

    def step():
        y = scan_norm(**leaves, scan=scan)
        torch.autograd.grad(y, list(leaves.values()), grad_y)

    with torch.no_grad():
        forward = median_ms(lambda: scan_norm(**inputs, scan=scan), in_a_row=10)
    held, peak = held_and_peak(step, True)
    return forward, median_ms(step, in_a_row=10), peak - held


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('error: torch finds no GPU')
    rows = [row for row in ROWS if args.rows in row.name]
    if not rows:
        sys.exit(f'error: no row has {args.rows!r} in its name; there are '
                 f'{", ".join(repr(row.name) for row in ROWS)}')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16')
    failed = False
    for row in rows:
        print(f'{row.name}: batch {row.batch}, D {row.dim}, N {row.state}')
        first = None
        for scan in PATTERNS:
            inputs = make(row, scan)
            if not is_right(inputs, scan):
                failed = True
                continue
            forward, step, peak = measure(inputs, scan)
            first = first or (forward, step)
            print(f'    forward {forward:.3f} ms, {forward / first[0]:.2f}x; with backward '
                  f'{step:.3f} ms, {step / first[1]:.2f}x; {peak / 2**20:.0f} MiB')
    sys.exit(int(failed))


if __name__ == '__main__':
    main()
