"""State space duality on a GPU: correctness, speed and memory, beside mamba-ssm's Triton kernels.

Each row is checked first, at its full length, with one sample and one group's first heads: the
result and every gradient in bf16 against fp64, with at most twice the error of plain PyTorch, or of
two roundings to bf16. What is wrong is not timed and makes the command fail.

The peer is mamba_chunk_scan_combined where mamba_ssm.ops.triton can be imported (its Python files
are enough), with the best of chunks of 64, 128 and 256; else published anchors, measured by us on
an H200. The floor is to read every input and to write the result once, at the speed of a copy.
"""

import argparse
import sys
from typing import NamedTuple

import torch
from ss2d_gpu import describe_gpu, graphed

from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.ops import ssd

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None

NAN = float('nan')
CHUNKS = 64, 128, 256  # of the peer
IN_A_ROW = 10


class Row(NamedTuple):
    """``anchors``: mamba-ssm on an H200 in ms, forward in a graph, forward + backward eagerly."""
    batch: int
    length: int
    heads: int
    dim: int
    state: int
    anchors: tuple[float, float] = (NAN, NAN)

    def __str__(self):
        return f'b{self.batch} l{self.length} h{self.heads} p{self.dim} n{self.state}'

    @property
    def bytes(self):
        tokens = self.batch * self.length
        return 2 * tokens * (2 * self.heads * self.dim + 2 * self.state + self.heads)


ROWS = [Row(64, 3136, 3, 64, 64, (0.315, 4.30)), Row(64, 196, 12, 64, 64, (0.094, 5.11)),
        Row(64, 49, 24, 64, 64, (0.085, 4.71)), Row(128, 3136, 6, 32, 16, (0.716, 4.84)),
        Row(1, 65536, 6, 64, 64, (0.409, 4.65)), Row(8, 2048, 80, 64, 128, (0.721, 4.95)),
        Row(1, 196, 12, 64, 64)]


def randn(*shape, seed, dtype=torch.bfloat16):
    rng = torch.Generator('cuda').manual_seed(seed)
    return torch.randn(shape, generator=rng, device='cuda').to(dtype)


def make_inputs(row, dtype=torch.bfloat16):
    """As Mamba-2 initialises them: A from -1 to -16, steps of about 0.001 to 0.1; B, C and x are
    parts of one tensor, as the convolution before gives them."""
    batch, length, heads, dim, state, _ = row
    single = torch.float32
    inner = heads * dim
    xBC = randn(batch, length, inner + 2 * state, seed=0, dtype=dtype)
    x, B, C = xBC.split((inner, state, state), dim=2)
    inputs = dict(
        x=x.unflatten(2, (heads, dim)), dt=randn(batch, length, heads, seed=1, dtype=dtype) / 2,
        A=-torch.linspace(1, 16, heads, device='cuda', dtype=single), B=B[:, :, None],
        C=C[:, :, None], D=randn(heads, seed=4, dtype=single),
        dt_bias=randn(heads, seed=5, dtype=single) - 4)
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def run(inputs, **options):
    return ssd(**inputs, dt_softplus=True, **options)


def run_peer(inputs, chunk):
    x, dt, A, B, C, D, bias = inputs.values()
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True)


def gradients(function, inputs, grad):
    y = function(inputs)
    return y.detach(), *torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype))


# --- correctness ----------------------------------------------------------------------------------

def check(row):
    """[(what, error, limit)] for the result and each gradient."""
    small = row._replace(batch=1, heads=min(row.heads, 4))
    inputs = make_inputs(small)
    grad = randn(*inputs['x'].shape, seed=9)
    double = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = gradients(lambda i: run(i, backend='chunked'), double, grad)
    plain = gradients(lambda i: run(i, backend='chunked'), inputs, grad)
    found = gradients(lambda i: run(i, backend='cuda'), inputs, grad)
    with torch.no_grad():
        alone = run(inputs, backend='cuda')
    return [(name, error(one, right), 2 * max(error(other, right), 2 ** -8))
            for name, one, other, right in zip(['y', *inputs, 'y alone'], (*found, alone),
                                               (*plain, plain[0]), (*exact, exact[0]),
                                               strict=True)]


def error(actual, expected):
    """Relative, in the 2-norm."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def is_right(row):
    errors = check(row)
    wrong = [name for name, error, limit in errors if not error <= limit]
    worst = max(errors, key=lambda e: e[1] / e[2])
    print(f'{row!s:26}{"WRONG " + ", ".join(wrong) if wrong else "ok":7}'
          f'worst {worst[0]} {worst[1]:.1e} of {worst[2]:.1e}', flush=True)
    torch.cuda.empty_cache()
    return not wrong


# --- times and memory -----------------------------------------------------------------------------

class Times(NamedTuple):
    """ms of a forward in a graph and eagerly, of forward + backward in a graph and eagerly; MiB
    that forward + backward need beside the inputs."""
    graph: float
    eager: float
    both_graph: float
    both: float
    memory: float


def measure(function, row, in_graph=True):
    """With ``in_graph`` also forward + backward in a graph, which must be possible."""
    inputs = make_inputs(row)
    grad = randn(*inputs['x'].shape, seed=9)

    def forward():
        with torch.no_grad():
            function(inputs)

    def both():
        gradients(function, inputs, grad)

    both()
    held, peak = held_and_peak(both, True)
    found = Times(median_ms(graphed(forward), in_a_row=IN_A_ROW),
                  median_ms(forward, in_a_row=IN_A_ROW),
                  median_ms(graphed(both), in_a_row=IN_A_ROW) if in_graph else NAN,
                  median_ms(both, in_a_row=IN_A_ROW), (peak - held) / 2**20)
    torch.cuda.empty_cache()
    return found


def measure_peer(row, chunks):
    """The best of each over the chunks; the memory that goes with the best of forward + backward.
    """
    if mamba_chunk_scan_combined is None:
        return Times(row.anchors[0], NAN, NAN, row.anchors[1], NAN)
    found = [measure(lambda i: run_peer(i, chunk), row, in_graph=False)  # noqa: B023
             for chunk in chunks]
    graph, eager, _, both, _ = (min(times) for times in zip(*found, strict=True))
    return Times(graph, eager, NAN, both, min(found, key=lambda times: times.both).memory)


def print_times(rows, chunks, copy):
    print('\nbf16, one group, dt_bias, softplus and D, ms; forward in a CUDA graph, forward + '
          f'backward eagerly and in a graph\n{"":26}{"forward":>8}{"peer":>8}{"ratio":>7}'
          f'{"of floor":>9}{"eager":>8}{"peer":>8}{"fwd+bwd":>9}{"peer":>8}{"ratio":>7}'
          f'{"graph":>8}{"MiB":>8}{"peer":>8}')
    for row in rows:
        ours, peer = measure(run, row), measure_peer(row, chunks)
        print(f'{row!s:26}{ours.graph:8.4f}{peer.graph:8.4f}{ours.graph / peer.graph:6.2f}x'
              f'{ours.graph * copy / row.bytes:8.2f}x{ours.eager:8.3f}{peer.eager:8.3f}'
              f'{ours.both:9.3f}{peer.both:8.3f}{ours.both / peer.both:6.2f}x'
              f'{ours.both_graph:8.3f}{ours.memory:8.0f}{peer.memory:8.0f}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    parser.add_argument('--chunks', type=int, nargs='+', default=CHUNKS, metavar='N',
                        help=f'of the peer (default: {" ".join(map(str, CHUNKS))})')
    parser.add_argument('--check-only', action='store_true', help='no times')
    args = parser.parse_args()
    rows = [row for row in ROWS if args.rows in str(row)]
    if not rows:
        parser.error(f'no row has {args.rows!r} in its name: {", ".join(map(str, ROWS))}')
    if not torch.cuda.is_available():
        raise SystemExit('error: torch finds no GPU here')
    gpu = describe_gpu()
    peer = 'mamba-ssm' if mamba_chunk_scan_combined is not None else 'anchors of mamba-ssm, H200'
    print(f'{gpu["name"]}, {gpu["multiprocessors"]} multiprocessors at {gpu["MHz"]:.0f} MHz at '
          f'most, copy {gpu["copy"] / 1e9:.2f} TB/s; torch {torch.__version__}; peer: {peer}')
    print('\nCorrectness: relative errors against fp64 in the 2-norm, and their limits')
    right = [row for row in rows if is_right(row)]
    if right and not args.check_only:
        print_times(right, args.chunks, gpu['copy'])
    if len(right) < len(rows):
        sys.exit(f'error: {len(rows) - len(right)} rows are wrong; they were not timed')


if __name__ == '__main__':
    main()
