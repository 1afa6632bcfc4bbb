"""The middle of SS2D, from SiLU to the output of its norm, on a GPU: correctness, speed, memory.

Each row is checked first, at the size that is timed: the map and every gradient against fp64, with
at most twice the error of plain PyTorch under autocast. What is wrong is not timed and makes the
command fail.

The official times are published anchors: measured by us on an H100, with the public VMamba code
and its own CUDA extension. Compare them on the same GPU only.
"""

import argparse
import csv
import subprocess
import sys
from typing import NamedTuple

import materialised
import torch
import torch.nn.functional as F
from floors import ROUTES, floors

from vmamba_mm.mm.measuring import median_ms
from vmamba_mm.ops import BACKENDS, ss2d_scan, ss2d_scan_norm
from vmamba_mm.testing import relative_error, ss2d_scan_inputs

NAN = float('nan')


class Row(NamedTuple):
    """A line of the table; ``official`` are the times (forward, forward+backward) in ms."""
    name: str
    batch: int
    dim: int
    height: int
    width: int
    state: int
    rank: int
    official: tuple[float, float] = (NAN, NAN)

    @property
    def steps(self):
        return self.batch * ROUTES * self.dim * self.height * self.width


def stage(name, dim, side, rank, official):
    return Row(name, 128, dim, side, side, 1, rank, official)


ROWS = [
    stage('s1l8 stage 1', 96, 56, 6, (4.735, 11.885)),
    stage('s1l8 stage 2', 192, 28, 12, (2.042, 5.708)),
    stage('s1l8 stage 3', 384, 14, 24, (1.447, 3.645)),
    stage('s1l8 stage 4', 768, 7, 48, (1.024, 3.136)),
    stage('s2l5 stage 1', 192, 56, 6, (7.918, 21.425)),
    stage('s2l5 stage 2', 384, 28, 12, (3.706, 10.394)),
    stage('s2l5 stage 3', 768, 14, 24, (1.918, 6.009)),
    stage('s2l5 stage 4', 1536, 7, 48, (1.77, 5.11)),
    Row('one 800x1280 image', 1, 96, 200, 320, 1, 6),
    Row('vanilla stage 1', 128, 192, 56, 56, 16, 6)]
PASSES = ('forward', 'fwd+bwd')
MEMORY_ROW = ROWS[0]


def describe_gpu():
    """Name, multiprocessors, highest clock in MHz (NaN if unknown), copy speed in bytes/ms."""
    properties = torch.cuda.get_device_properties()
    query = ['nvidia-smi', '-i', f'GPU-{properties.uuid}', '--query-gpu=clocks.max.sm',
             '--format=csv,noheader,nounits']
    try:
        clock = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        clock = NAN
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source))
    return {'name': properties.name, 'multiprocessors': properties.multi_processor_count,
            'MHz': clock, 'copy': copy}


# --- what is timed --------------------------------------------------------------------------

def make_inputs(row):
    """The arguments of the model: x in half precision, parameters in fp32, A by its logarithm."""
    inputs = ss2d_scan_inputs(row.batch, row.dim, row.height, row.width, state=row.state,
                              rank=row.rank, device='cuda')
    inputs['x'] = inputs['x'].half().contiguous(memory_format=torch.channels_last)
    inputs['A_logs'] = torch.log(-inputs.pop('A'))
    rng = torch.Generator('cuda').manual_seed(1)
    inputs['norm_weight'], inputs['norm_bias'] = (
        torch.randn(row.dim, generator=rng, device='cuda') for _ in range(2))
    grad_y = torch.randn(inputs['x'].shape, generator=rng, device='cuda').half().contiguous(
        memory_format=torch.channels_last)
    return {name: t.requires_grad_() for name, t in inputs.items()}, grad_y


def forward(op, inputs, **kwargs):
    inputs = dict(inputs)
    return op(A=-torch.exp(inputs.pop('A_logs').float()), **inputs, **kwargs)


def forward_backward(op, inputs, grad_y, **kwargs):
    y = forward(op, inputs, **kwargs)
    return y, torch.autograd.grad(y, list(inputs.values()), grad_y)


def graphed(function):
    """Replays of a CUDA graph: the GPU's time without the launches'."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_row(row, backend, backward):
    """ms of a graph's replay; of eager calls in a row, as in a network; of an eager call alone."""
    inputs, grad_y = make_inputs(row)

    def run():
        if backward:
            forward_backward(ss2d_scan_norm, inputs, grad_y, backend=backend)
        else:
            with torch.no_grad():
                forward(ss2d_scan_norm, inputs, backend=backend)

    return median_ms(graphed(run)), median_ms(run, in_a_row=20), median_ms(run)


def peak_bytes(row, op):
    """Most bytes that forward and backward hold, x and dy among them."""
    inputs, grad_y = make_inputs(row)
    forward_backward(op, inputs, grad_y)  # the libraries' workspaces and compilation
    held = torch.cuda.memory_allocated() - inputs['x'].nbytes - grad_y.nbytes
    torch.cuda.reset_peak_memory_stats()
    forward_backward(op, inputs, grad_y)
    return torch.cuda.max_memory_allocated() - held


# --- correctness ----------------------------------------------------------------------------

def exact(backend, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
          norm_bias):
    y = ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, backend=backend)
    y = F.layer_norm(y.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias)
    return y.permute(0, 3, 1, 2)


def check(row, backend, backward):
    """{what: (error, limit)} for y and each gradient.

    Only the first and the last image of the batch get a gradient, so that those by the
    parameters are theirs alone, and the fp64 reference has two images to do.
    """
    inputs, grad_y = make_inputs(row)
    images = sorted({0, row.batch - 1})
    grad_y[1:-1] = 0
    results = compute(ss2d_scan_norm, inputs, grad_y, backward, backend)
    few = {name: t.detach().requires_grad_() for name, t in
           dict(inputs, x=inputs['x'].detach()[images]).items()}
    double = {name: t.detach().double().requires_grad_() for name, t in few.items()}
    # The specification loops over L; beyond some thousand steps, the fast form of it in fp64,
    # which the tests hold to it within 1e-12.
    specification = 'reference' if row.height * row.width <= 4096 else 'chunked'
    expected = compute(exact, double, grad_y[images].double(), backward, specification)
    naive = compute(materialised.ss2d_scan_norm, few, grad_y[images], backward, 'chunked')
    errors = {}
    for name, value in results.items():
        value = value[images] if value.dim() == 4 else value
        limit = 2 * max(relative_error(naive[name], expected[name]), 2**-11)
        errors[name] = relative_error(value, expected[name]), limit
    if backward and results['x'][1:-1].any():
        errors['x where y has no gradient'] = float('inf'), 0.0
    return errors


def compute(op, inputs, grad_y, backward, backend):
    """y, which takes another path where no gradient is wanted, and gradients by name."""
    with torch.no_grad():
        results = {'y': forward(op, inputs, backend=backend)}
    if backward:
        y, grads = forward_backward(op, inputs, grad_y, backend=backend)
        results |= {'y of training': y.detach(), **dict(zip(inputs, grads, strict=True))}
    return results


# --- the tables -----------------------------------------------------------------------------

def show(value, form='.3f'):
    return '-' if value != value else format(value, form)


def print_checks(rows, backend, backward):
    """The rows that are right."""
    print('\nCorrectness: relative errors against fp64, at most 2x plain PyTorch under autocast')
    right = []
    for row in rows:
        errors = check(row, backend, backward)
        torch.cuda.empty_cache()
        wrong = [name for name, (error, limit) in errors.items() if not error <= limit]
        nearest = sorted(errors, key=lambda name: errors[name][0] / (errors[name][1] or 1))[-2:]
        lines = [f'{name} {errors[name][0]:.1e} of {errors[name][1]:.1e}'
                 for name in dict.fromkeys(['y', *(wrong or nearest)])]
        print(f'{row.name:20}{"WRONG" if wrong else "ok":7}{", ".join(lines)}', flush=True)
        if not wrong:
            right.append(row)
    return right


def print_times(rows, args, backward, gpu):
    print('\nMedians in ms: replays of a graph, 20 eager calls in a row, one alone; official: '
          'published anchors, measured by us on an H100\n'
          f'{"":20}{"":9}{"graph":>8}{"in a row":>10}{"alone":>8}{"official":>10}'
          f'{"faster":>8}'
          + (f'{"plain":>9}' if args.plain else ''))
    records = []
    for row in rows:
        for i in range(1 + backward):
            graph, in_a_row, alone = time_row(row, args.backend, bool(i))
            torch.cuda.empty_cache()
            plain = time_row(row, 'chunked', bool(i))[2] if args.plain else NAN
            torch.cuda.empty_cache()
            floor, size = floors(row.steps, row.state, bool(i), gpu)
            official = row.official[i]
            records.append(dict(
                row=row.name, what=PASSES[i], graph=graph, in_a_row=in_a_row, alone=alone,
                official=official, plain=plain, minimal_bytes=size,
                **{f'floor_{name}': value for name, value in floor.items()},
                of_floor=max(floor.values()) / graph, TB_per_s=size / graph / 1e9))
            print(f'{row.name:20}{PASSES[i]:9}{graph:8.3f}{in_a_row:10.3f}{alone:8.3f}'
                  f'{show(official):>10}{show(official / graph, ".1f"):>8}'
                  + (f'{plain:9.1f}' if args.plain else ''), flush=True)
    return records


def print_floors(records):
    print('\nFloors in ms; of floor: the highest by the graph\'s time; TB/s of the fewest bytes\n'
          f'{"":20}{"":9}{"bytes":>8}{"special":>9}{"instr.":>8}{"graph":>9}{"of floor":>10}'
          f'{"MB":>8}{"TB/s":>7}')
    for r in records:
        print(f'{r["row"]:20}{r["what"]:9}{r["floor_bytes"]:8.3f}{show(r["floor_special"]):>9}'
              f'{show(r["floor_instructions"]):>8}{r["graph"]:9.3f}{show(r["of_floor"], ".0%"):>10}'
              f'{r["minimal_bytes"] / 1e6:8.1f}{r["TB_per_s"]:7.2f}')


def print_memory(backend):
    def ours(**kwargs):
        return ss2d_scan_norm(**kwargs, backend=backend)

    peak = peak_bytes(MEMORY_ROW, ours)
    torch.cuda.empty_cache()
    four = peak_bytes(MEMORY_ROW, materialised.ss2d_scan_norm)
    print(f'\nPeak memory of forward and backward, {MEMORY_ROW.name}: {peak / 2**20:.0f} MiB; with '
          f'four materialised directions {four / 2**20:.0f} MiB; ratio {peak / four:.2f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    parser.add_argument('--backend', choices=BACKENDS, help="default: the op's own choice")
    parser.add_argument('--plain', action='store_true', help='time plain PyTorch too (slow)')
    parser.add_argument('--no-backward', action='store_true', help='the forward only')
    parser.add_argument('--csv', metavar='FILE', help='write all numbers there too')
    args = parser.parse_args()
    rows = [row for row in ROWS if args.rows in row.name]
    if not rows:
        parser.error(f'no row has {args.rows!r} in its name: {", ".join(r.name for r in ROWS)}')
    if not torch.cuda.is_available():
        raise SystemExit('error: torch finds no GPU here')
    try:
        from triton import __version__ as triton_version
    except ModuleNotFoundError:
        triton_version = 'absent'
    gpu, backward = describe_gpu(), not args.no_backward
    print(f'{gpu["name"]}, {gpu["multiprocessors"]} multiprocessors at {gpu["MHz"]:.0f} MHz at '
          f'most, copy {gpu["copy"] / 1e9:.2f} TB/s; torch {torch.__version__}, triton '
          f'{triton_version}; fp16 autocast: x float16, parameters float32; batch 128 unless said;'
          f' backend {args.backend or "by default"}')
    right = print_checks(rows, args.backend, backward)
    records = print_times(right, args, backward, gpu)
    print_floors(records)
    if backward and MEMORY_ROW in right:
        print_memory(args.backend)
    if args.csv and records:
        with open(args.csv, 'w', newline='') as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    if len(right) < len(rows):
        sys.exit(f'error: {len(rows) - len(right)} of {len(rows)} rows are wrong; they were not '
                 'timed')


if __name__ == '__main__':
    main()
