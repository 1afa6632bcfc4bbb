"""The selective scan along sequences and the bidirectional mixer on a GPU: correctness, speed.

Each row is checked first: outputs and every gradient in fp16 against fp64, with at most twice the
error of plain PyTorch. What is wrong is not timed and makes the command fail. The check has one
sample and at most 64 channels of the row, at its full length.

In graphs it is the GPU that is timed; an eager forward + backward of few samples waits for Python,
for torch's autograd and for its thread, whichever scan it runs.

Peers: mamba-ssm's CUDA scan where it is installed, else published anchors, measured by us on an
H200 (they compare on the same GPU only, and there is none for forward + backward in a graph); and a
port of the pipeline around it that the official code of a bidirectional mixer runs: two
convolutions, two projections, two scans, two flips, gate, sum. Its convolution is this package's.
Without mamba-ssm the port is timed without its scans, and the anchors of two scans are added: such
a time is marked with ~.
"""

import argparse
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ss2d_gpu import describe_gpu, graphed, show

from vmamba_mm.mm.measuring import median_ms
from vmamba_mm.ops import causal_conv, mamba_inner, selective_scan
from vmamba_mm.testing import relative_error

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

NAN, STATE = float('nan'), 16
SPECIAL_PER_CLOCK = 16  # exponentials of a multiprocessor


class Row(NamedTuple):
    """``anchors``: mamba-ssm on an H200 in ms, forward in a graph, forward + backward eagerly."""
    batch: int
    dim: int
    length: int
    anchors: tuple[float, float] = (NAN, NAN)

    def __str__(self):
        return f'b{self.batch} d{self.dim} l{self.length}'


SCANS = [Row(64, 384, 197, (0.190, 0.813)), Row(64, 768, 197, (0.373, 1.576)),
         Row(128, 384, 197, (0.374, 1.544)), Row(8, 768, 4096, (0.412, 2.207)),
         Row(1, 384, 65536, (0.648, 2.617)), Row(8, 5120, 2048, (1.338, 7.182)),
         Row(64, 384, 1568, (1.345, 6.064))]
MIXERS = [Row(64, 768, 197), Row(128, 768, 197)]


def randn(*shape, seed, dtype=torch.float16):
    rng = torch.Generator('cuda').manual_seed(seed)
    return torch.randn(shape, generator=rng, device='cuda').to(dtype)


# --- single scans ---------------------------------------------------------------------------------

def scan_inputs(row):
    """As Mamba initialises them: A from -1 to -16, steps of about 0.001 to 0.1."""
    batch, dim, length, _ = row
    single = torch.float32
    inputs = dict(
        u=randn(batch, dim, length, seed=0), delta=randn(batch, dim, length, seed=1) / 2,
        A=-torch.arange(1, STATE + 1, device='cuda', dtype=single).repeat(dim, 1),
        B=randn(batch, 1, STATE, length, seed=2), C=randn(batch, 1, STATE, length, seed=3),
        D=randn(dim, seed=4, dtype=single), delta_bias=randn(dim, seed=5, dtype=single) - 4)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def scan(inputs, **options):
    return selective_scan(**inputs, delta_softplus=True, **options)


def official_scan(inputs, z=None):
    u, delta, A, B, C, D, bias = inputs.values()
    return selective_scan_fn(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


# --- the bidirectional mixer ----------------------------------------------------------------------

def mixer_inputs(row):
    """Parameters in fp32 and a map in fp16, as under autocast; dt_rank as in Vim."""
    batch, dim, length, _ = row
    rank, single = max(dim // 32, 1), torch.float32
    inputs = dict(
        xz=randn(batch, length, 2 * dim, seed=0),
        conv_weight=randn(2, dim, 4, seed=1, dtype=single) / 2,
        conv_bias=randn(2, dim, seed=2, dtype=single) / 2,
        x_proj=randn(2, rank + 2 * STATE, dim, seed=3, dtype=single) / dim ** 0.5,
        dt_proj=randn(2, dim, rank, seed=4, dtype=single) / rank ** 0.5,
        dt_bias=randn(2, dim, seed=5, dtype=single) - 4,
        A=-torch.arange(1, STATE + 1, device='cuda', dtype=single).repeat(2, dim, 1),
        D=randn(2, dim, seed=6, dtype=single))
    return {name: t.requires_grad_() for name, t in inputs.items()}


def mixer(inputs, **options):
    return mamba_inner(**inputs, **options)


def pipeline(inputs, scan_function=None, **options):
    """The official pipeline, in its layout (B, D, L); without the scans if there is no function."""
    xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = inputs.values()
    xz = xz.transpose(1, 2).contiguous()
    rank, total, dtype = dt_proj.shape[2], 0, xz.dtype
    for k in range(2):
        x, z = (xz.flip(-1) if k else xz).chunk(2, dim=1)
        u = causal_conv(x.transpose(1, 2), conv_weight[k], conv_bias[k], **options).transpose(1, 2)
        projected = F.linear(u.transpose(1, 2), x_proj[k].to(dtype))
        dt, B, C = projected.split((rank, STATE, STATE), dim=2)
        delta = torch.matmul(dt_proj[k].to(dtype), dt.transpose(1, 2))
        B, C = (t.transpose(1, 2)[:, None].contiguous() for t in (B, C))
        if scan_function is None:
            y = (u + delta) * (B + C).sum((1, 2))[:, None] * z
        else:
            y = scan_function(dict(u=u, delta=delta, A=A[k], B=B, C=C, D=D[k], bias=dt_bias[k]), z)
        total = total + (y.flip(-1) if k else y)
    return total.transpose(1, 2)


# --- correctness and times ------------------------------------------------------------------------

def with_gradients(function, inputs, grad, **options):
    y = function(inputs, **options)
    # The pipeline without its scans does not use all.
    return y.detach(), *torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype),
                                            allow_unused=True)


def plain_scan(inputs):
    return scan(inputs, backend='chunked')


def plain_mixer(inputs):
    """The pipeline in plain PyTorch, with maps in half precision between its steps."""
    def run(tensors, z):
        tensors['delta_bias'] = tensors.pop('bias')
        return selective_scan(**tensors, z=z, delta_softplus=True, backend='chunked')

    return pipeline(inputs, run, backend='chunked')


def check(row, make, function, plain_function):
    """[(what, error, limit)] for the result and each gradient."""
    small = row._replace(batch=1, dim=min(row.dim, 64))
    inputs = make(small)
    grad = randn(*function(inputs).shape, seed=9)
    double = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = with_gradients(function, double, grad, backend='chunked')
    plain = with_gradients(plain_function, inputs, grad)
    found = with_gradients(function, inputs, grad)
    with torch.no_grad():
        found_alone = function(inputs)
    names = ['y', *inputs, 'y alone']
    return [(name, relative_error(one, right), 2 * max(relative_error(other, right), 2 ** -11))
            for name, one, other, right in zip(names, (*found, found_alone), (*plain, plain[0]),
                                               (*exact, exact[0]), strict=True)]


def print_check(row, what, make, function, plain_function):
    errors = check(row, make, function, plain_function)
    wrong = [name for name, error, limit in errors if not error <= limit]
    worst = max(errors, key=lambda e: e[1] / e[2])
    print(f'{row!s:20}{what:8}{"WRONG " + ", ".join(wrong) if wrong else "ok":7}'
          f'worst {worst[0]} {worst[1]:.1e} of {worst[2]:.1e}', flush=True)
    torch.cuda.empty_cache()
    return not wrong


def times(function, inputs, shape):
    """ms: forward in a graph; forward and backward in a graph, eagerly in a row."""
    grad = randn(*shape, seed=9)

    def forward():
        with torch.no_grad():
            function(inputs)

    def both():
        with_gradients(function, inputs, grad)

    found = (median_ms(graphed(forward)), median_ms(graphed(both)), median_ms(both, in_a_row=10))
    torch.cuda.empty_cache()
    return found


def print_scans(rows, special):
    print('\nSingle scans, N = 16, fp16, ms; of floor: one exponential a state and step; forward '
          'and fwd+bwd in graphs\n'
          f'{"":20}{"forward":>9}{"of floor":>9}{"peer":>8}{"ratio":>7}'
          f'{"fwd+bwd":>10}{"peer":>8}{"ratio":>7}{"eager":>10}{"peer":>8}{"ratio":>7}')
    for row in rows:
        inputs = scan_inputs(row)
        shape = row[:3]
        ours = times(scan, inputs, shape)
        peer = row.anchors[0], NAN, row.anchors[1]
        if selective_scan_fn is not None:
            peer = times(official_scan, inputs, shape)
        floor = row.batch * row.dim * row.length * STATE / special
        print(f'{row!s:20}{ours[0]:9.3f}{floor / ours[0]:9.0%}{peer[0]:8.3f}'
              f'{ours[0] / peer[0]:6.2f}x{ours[1]:10.3f}{peer[1]:8.3f}{ours[1] / peer[1]:6.2f}x'
              f'{ours[2]:10.3f}{peer[2]:8.3f}{ours[2] / peer[2]:6.2f}x', flush=True)


def print_mixers(rows, special):
    mark = '' if selective_scan_fn is not None else '~'
    print('\nBidirectional mixer, N = 16, fp16, ms; pipeline: the official one\n'
          f'{"":20}{"forward":>9}{"of floor":>9}{"pipeline":>10}{"ratio":>7}'
          f'{"fwd+bwd":>10}{"eager":>8}{"pipeline":>10}{"ratio":>7}')
    for row in rows:
        inputs = mixer_inputs(row)
        shape = row.batch, row.length, row.dim
        ours = times(mixer, inputs, shape)
        if selective_scan_fn is not None:
            peer = times(lambda i: pipeline(i, official_scan), inputs, shape)  # noqa: B023
        else:
            # Two scans of b64 d768 l197 per 64 samples, and all that is around them.
            around = times(pipeline, inputs, shape)
            anchors = next(r.anchors for r in SCANS if r[:3] == (64, 768, 197))
            scans = [2 * t * row.batch / 64 for t in anchors]
            peer = around[0] + scans[0], around[1] + scans[1], around[2] + scans[1]
        floor = 2 * row.batch * row.dim * row.length * STATE / special
        print(f'{row!s:20}{ours[0]:9.3f}{floor / ours[0]:9.0%}{mark + show(peer[0]):>10}'
              f'{ours[0] / peer[0]:6.2f}x{ours[1]:10.3f}{ours[2]:8.3f}{mark + show(peer[2]):>10}'
              f'{ours[2] / peer[2]:6.2f}x', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    args = parser.parse_args()
    scans = [row for row in SCANS if args.rows in str(row)]
    mixers = [row for row in MIXERS if args.rows in str(row)]
    if not scans and not mixers:
        parser.error(f'no row has {args.rows!r} in its name: {", ".join(map(str, SCANS + MIXERS))}')
    if not torch.cuda.is_available():
        raise SystemExit('error: torch finds no GPU here')
    gpu = describe_gpu()
    special = gpu['multiprocessors'] * SPECIAL_PER_CLOCK * gpu['MHz'] * 1e3
    print(f'{gpu["name"]}, {gpu["multiprocessors"]} multiprocessors at {gpu["MHz"]:.0f} MHz at '
          f'most, copy {gpu["copy"] / 1e9:.2f} TB/s; torch {torch.__version__}; peer: '
          f'{"mamba-ssm" if selective_scan_fn is not None else "anchors of mamba-ssm, H200"}')
    print('\nCorrectness: relative errors against fp64, at most 2x plain PyTorch in fp16')
    right_scans = [row for row in scans
                   if print_check(row, 'scan', scan_inputs, scan, plain_scan)]
    right_mixers = [row for row in mixers
                    if print_check(row, 'mixer', mixer_inputs, mixer, plain_mixer)]
    if right_scans:
        print_scans(right_scans, special)
    if right_mixers:
        print_mixers(right_mixers, special)
    wrong = len(scans) + len(mixers) - len(right_scans) - len(right_mixers)
    if wrong:
        sys.exit(f'error: {wrong} rows are wrong; they were not timed')


if __name__ == '__main__':
    main()
