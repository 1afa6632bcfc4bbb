"""WKV on a GPU, causal and of both directions: correctness and speed, beside the public loops.

Each row is checked first, at its full length, with one sample and 64 channels: the result and every
gradient against fp64, with at most twice the error of plain PyTorch, or of two roundings to the
dtype. What is wrong is not timed and makes the command fail.

The peer is a plain port of the loops of the public CUDA extensions: a thread for each channel of a
sample, which passes over the tokens one after the other, in fp32. The floor is to read every map of
tokens and to write each result once, at the speed of a copy: 3 maps forward, 5 backward.

The peers' numbers are compared with plain PyTorch too, with keys that its subtractions can take.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from ss2d_gpu import describe_gpu, graphed

from vmamba_mm.mm.measuring import median_ms
from vmamba_mm.ops import bi_wkv, wkv
from vmamba_mm.ops.core.launch import Instance, load
from vmamba_mm.ops.wkv import cuda_launch

IN_A_ROW = 10
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
PEER = r"""
struct PeerParams {
    const float *w, *u, *k, *v, *dy;  // w is the decay itself
    float *y, *dk, *dv, *dw, *du;     // dw, du (B, C)
    float *r, *ry, *top;              // (B, T, C)
    int batch, length, channels;
};

// exp(top) * (a, b)
struct Sum {
    float a, b, top;
    __device__ void add(float x, float y, float exponent) {
        const float most = fmaxf(top, exponent);
        const float mine = __expf(top - most), theirs = __expf(exponent - most);
        a = mine * a + theirs * x, b = mine * b + theirs * y, top = most;
    }
};

#define START \
    const int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= p.batch * p.channels) return; \
    const int c = i % p.channels, length = p.length, step = p.channels; \
    const long long first = (long long)(i / p.channels) * length * step + c; \
    const float w = p.w[c], u = p.u[c]; \
    const float *const k = p.k + first, *const v = p.v + first; \
    float *const y = p.y + first;

__global__ void causal_forward(const PeerParams p) {
    START
    Sum sum = {0.f, 0.f, -1e38f};
    for (int t = 0; t < length; ++t) {
        const float key = k[t * step], value = v[t * step];
        Sum all = sum;
        all.add(value, 1.f, u + key);
        y[t * step] = all.a / all.b;
        sum.top -= w;
        sum.add(value, 1.f, key);
    }
}

__global__ void causal_backward(const PeerParams p) {
    START
    float *const r = p.r + first, *const top = p.top + first;
    Sum sum = {0.f, 0.f, -1e38f};
    float by_w = 0.f, by_u = 0.f, da = 0.f, db = 0.f;  // derivatives of the sums by w
    for (int t = 0; t < length; ++t) {
        const float key = k[t * step], value = v[t * step];
        Sum all = sum;
        all.add(value, 1.f, u + key);
        const float factor = __expf(sum.top - all.top), mean = all.a / all.b;
        y[t * step] = mean;
        r[t * step] = p.dy[first + t * step] / all.b;
        top[t * step] = all.top;
        by_w += r[t * step] * factor * (da - mean * db);
        by_u += r[t * step] * __expf(u + key - all.top) * (value - mean);
        const float before = sum.top;
        sum.top -= w;
        da -= sum.a, db -= sum.b;
        sum.add(value, 1.f, key);
        const float decay = __expf(before - w - sum.top);
        da *= decay, db *= decay;
    }
    p.dw[i] = by_w, p.du[i] = by_u;
    Sum drive = {0.f, 0.f, -1e38f};
    for (int t = length - 1; t >= 0; --t) {
        const float key = k[t * step], value = v[t * step], mean = y[t * step];
        const float e = __expf(key + drive.top);
        const float now = __expf(u + key - top[t * step]) * r[t * step];
        p.dv[first + t * step] = e * drive.a + now;
        p.dk[first + t * step] = e * (value * drive.a - drive.b) + now * (value - mean);
        drive.top -= w;
        drive.add(r[t * step], r[t * step] * mean, -top[t * step]);
    }
}

// The sums of the tokens after one become those of the next by a subtraction.
__global__ void both_forward(const PeerParams p) {
    START
    Sum before = {0.f, 0.f, -1e38f}, after = {0.f, 0.f, -1e38f};
    for (int t = length - 1; t > 0; --t) {
        after.top -= w;
        after.add(v[t * step], 1.f, k[t * step]);
    }
    for (int t = 0; t < length; ++t) {
        const float key = k[t * step], value = v[t * step];
        Sum all = before;
        all.add(after.a, after.b, after.top);
        all.add(value, 1.f, u + key);
        y[t * step] = all.a / all.b;
        before.top -= w;
        before.add(value, 1.f, key);
        const int next = min(t + 1, length - 1) * step;
        const float e = __expf(k[next] - after.top);
        after.a -= e * v[next], after.b -= e, after.top += w;
    }
}

__global__ void both_backward(const PeerParams p) {
    START
    float *const r = p.r + first, *const ry = p.ry + first, *const top = p.top + first;
    Sum before = {0.f, 0.f, -1e38f}, after = {0.f, 0.f, -1e38f};
    float by_w = 0.f, by_u = 0.f, da = 0.f, db = 0.f, ea = 0.f, eb = 0.f;
    for (int t = length - 1; t > 0; --t) {
        const float last = after.top;
        after.top -= w;
        ea -= after.a, eb -= after.b;
        after.add(v[t * step], 1.f, k[t * step]);
        const float decay = __expf(last - w - after.top);
        ea *= decay, eb *= decay;
    }
    for (int t = 0; t < length; ++t) {
        const float key = k[t * step], value = v[t * step];
        Sum all = before;
        all.add(after.a, after.b, after.top);
        all.add(value, 1.f, u + key);
        const float mean = all.a / all.b, by = p.dy[first + t * step] / all.b;
        const float of_before = __expf(before.top - all.top);
        const float of_after = __expf(after.top - all.top);
        r[t * step] = by, ry[t * step] = by * mean, top[t * step] = all.top;
        by_w += by * (of_before * (da - mean * db) + of_after * (ea - mean * eb));
        by_u += by * __expf(u + key - all.top) * (value - mean);
        const float last = before.top;
        before.top -= w;
        da -= before.a, db -= before.b;
        before.add(value, 1.f, key);
        const float decay = __expf(last - w - before.top);
        da *= decay, db *= decay;
        const int next = min(t + 1, length - 1) * step;
        const float e = __expf(k[next] - after.top);
        after.a -= e * v[next], after.b -= e, after.top += w;
        ea += after.a, eb += after.b;
    }
    p.dw[i] = by_w, p.du[i] = by_u;
    before = after = {0.f, 0.f, -1e38f};
    for (int t = length - 1; t > 0; --t) {
        after.top -= w;
        after.add(r[t * step], ry[t * step], -top[t * step]);
    }
    for (int t = 0; t < length; ++t) {
        const float key = k[t * step], value = v[t * step];
        const float e = __expf(key + before.top), f = __expf(key + after.top);
        const float now = __expf(u + key - top[t * step]);
        const float by_value = e * before.a + f * after.a + now * r[t * step];
        p.dv[first + t * step] = by_value;
        p.dk[first + t * step] = value * by_value
                                 - (e * before.b + f * after.b + now * ry[t * step]);
        before.top -= w;
        before.add(r[t * step], ry[t * step], -top[t * step]);
        const int next = min(t + 1, length - 1) * step;
        const float g = __expf(-top[next] - after.top);
        after.a -= g * r[next], after.b -= g * ry[next], after.top += w;
    }
}
"""


class Row(NamedTuple):
    op: str  #: 'wkv', or the mode of bi_wkv
    batch: int
    length: int
    channels: int
    dtype: str

    def __str__(self):
        return f'{self.op:9}b{self.batch} t{self.length} c{self.channels} {self.dtype}'

    @property
    def bytes(self):
        """Of a map."""
        return self.batch * self.length * self.channels * DTYPES[self.dtype].itemsize


SHAPES = [(128, 196, 384, 'fp16'), (128, 196, 384, 'fp32'), (1, 16384, 384, 'fp16'),
          (64, 1024, 384, 'bf16'), (8, 4200, 192, 'fp16'), (1, 196, 192, 'fp16')]
ROWS = [Row(op, *shape) for op in ('paper', 'wkv', 'official') for shape in SHAPES]


def randn(*shape, seed, dtype=torch.float32):
    rng = torch.Generator('cuda').manual_seed(seed)
    return torch.randn(shape, generator=rng, device='cuda').to(dtype)


def make_inputs(row, dtype=None):
    """As the models pass them: RWKV-4 the logarithm of a decay, Vision-RWKV a decay and a bonus
    that are divided by the number of tokens."""
    dtype, shape = dtype or DTYPES[row.dtype], (row.batch, row.length, row.channels)
    scale = 1 if row.op == 'wkv' else 1 / row.length
    inputs = dict(w=torch.linspace(-5, 3, row.channels, device='cuda') * scale,
                  u=randn(row.channels, seed=1) * scale, k=randn(*shape, seed=2, dtype=dtype),
                  v=randn(*shape, seed=3, dtype=dtype))
    return {name: t.requires_grad_() for name, t in inputs.items()}


def run(row, inputs, backend=None):
    if row.op == 'wkv':
        return wkv(**inputs, backend=backend)
    return bi_wkv(**inputs, mode=row.op, backend=backend)


def gradients(row, inputs, grad, backend=None):
    y = run(row, inputs, backend)
    return y.detach(), *torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype))


# --- the peer -------------------------------------------------------------------------------------

class Peer:
    """The loops for fp32 maps of a row's shape; none of the official mode, which takes those of
    the paper's formula."""

    def __init__(self, row, folder):
        path = Path(folder, 'wkv_peer.cu')
        path.write_text(PEER)
        inputs = make_inputs(row, torch.float32)
        self.inputs = {name: t.detach() for name, t in inputs.items()}
        k, w = self.inputs['k'], self.inputs['w']
        if row.op == 'wkv':
            self.inputs['w'] = w.exp()
        self.dy = randn(*k.shape, seed=9)
        self.y, self.dk, self.dv, r, ry, top = (torch.empty_like(k) for _ in range(6))
        self.dw, self.du = (k.new_empty(row.batch, row.channels) for _ in range(2))
        kind = 'causal' if row.op == 'wkv' else 'both'
        self.memory = r, ry, top
        results = dict(dy=self.dy, y=self.y, dk=self.dk, dv=self.dv, dw=self.dw, du=self.du, r=r,
                       ry=ry, top=top)
        addresses = {name: t.data_ptr() for name, t in (self.inputs | results).items()}
        self.forward, self.backward = (self._bind(str(path), f'{kind}_{which}', row, addresses)
                                       for which in ('forward', 'backward'))

    def _bind(self, path, name, row, addresses):
        launch = load(Instance(path, name), self.y.device).bind(
            (-(-row.batch * row.channels // 32), 1, 1), (32, 1, 1), batch=row.batch,
            length=row.length, channels=row.channels)
        return lambda: launch(**addresses)

    def errors(self, row):
        """Of the result and the gradients by k, v, w and u."""
        self.forward()
        found = [self.y.clone()]
        self.backward()
        found += [self.dk, self.dv, self.dw.sum(0), self.du.sum(0)]
        if row.op == 'wkv':
            found[3] = found[3] * self.inputs['w']
        exact = gradients(row._replace(op='paper' if row.op == 'official' else row.op), {
            name: t.detach().double().requires_grad_()
            for name, t in make_inputs(row, torch.float32).items()}, self.dy.double(), 'chunked')
        return [error(one, right) for one, right in zip(
            found, [exact[0], *exact[3:], *exact[1:3]], strict=True)]


# --- correctness ----------------------------------------------------------------------------------

def error(actual, expected):
    """Relative, in the 2-norm."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def is_right(row):
    small = row._replace(batch=1, channels=64)
    inputs = make_inputs(small)
    grad = randn(*inputs['v'].shape, seed=9, dtype=DTYPES[row.dtype])
    double = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = gradients(small, double, grad, 'chunked')
    plain, found = (gradients(small, inputs, grad, backend) for backend in ('chunked', None))
    floor = max(torch.finfo(DTYPES[row.dtype]).eps, 2e-6)
    errors = [(name, error(one, right), 2 * max(error(other, right), floor))
              for name, one, other, right in zip(['y', *inputs], found, plain, exact, strict=True)]
    wrong = [name for name, found, limit in errors if not found <= limit]
    worst = max(errors, key=lambda e: e[1] / e[2])
    print(f'{row!s:31}{"WRONG " + ", ".join(wrong) if wrong else "ok":7}'
          f'worst {worst[0]} {worst[1]:.1e} of {worst[2]:.1e}', flush=True)
    return not wrong


# --- times ----------------------------------------------------------------------------------------

def measure(row):
    """ms of a forward and of forward + backward in a graph, and of the latter eagerly."""
    inputs = make_inputs(row)
    grad = randn(*inputs['v'].shape, seed=9, dtype=DTYPES[row.dtype])

    def forward():
        with torch.no_grad():
            run(row, inputs)

    def both():
        gradients(row, inputs, grad)

    functions = graphed(forward), graphed(both), both
    return [median_ms(function, in_a_row=IN_A_ROW) for function in functions]


def measure_peer(row):
    """ms of a forward and of a backward, in graphs."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(row, folder)
        return [median_ms(graphed(function), in_a_row=IN_A_ROW)
                for function in (peer.forward, peer.backward)]


def print_times(rows, copy):
    print('\nms: forward, forward + backward and their difference in CUDA graphs, and forward + '
          f'backward eagerly\n{"":31}{"forward":>8}{"of floor":>9}{"peer":>8}{"ratio":>7}'
          f'{"backward":>9}{"of floor":>9}{"peer":>8}{"ratio":>7}{"fwd+bwd":>9}{"eager":>8}')
    for row in rows:
        fwd, both, eager = measure(row)
        torch.cuda.empty_cache()
        peer_fwd, peer_bwd = measure_peer(row)
        torch.cuda.empty_cache()
        bwd = both - fwd
        print(f'{row!s:31}{fwd:8.4f}{fwd * copy / (3 * row.bytes):8.2f}x{peer_fwd:8.4f}'
              f'{fwd / peer_fwd:6.2f}x{bwd:9.4f}{bwd * copy / (5 * row.bytes):8.2f}x'
              f'{peer_bwd:8.4f}{bwd / peer_bwd:6.2f}x{both:9.4f}{eager:8.3f}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    parser.add_argument('--span', type=int, choices=list(cuda_launch.HEIGHTS), metavar='N',
                        help='tokens of a warp (default: as the op chooses)')
    parser.add_argument('--check-only', action='store_true', help='no times')
    args = parser.parse_args()
    rows = [row for row in ROWS if args.rows in str(row)]
    if not rows:
        parser.error(f'no row has {args.rows!r} in its name: {", ".join(map(str, ROWS))}')
    if not torch.cuda.is_available():
        raise SystemExit('error: torch finds no GPU here')
    cuda_launch.force_span = args.span
    gpu = describe_gpu()
    print(f'{gpu["name"]}, {gpu["multiprocessors"]} multiprocessors at {gpu["MHz"]:.0f} MHz at '
          f'most, copy {gpu["copy"] / 1e9:.2f} TB/s; torch {torch.__version__}')
    print('\nCorrectness: relative errors against fp64 in the 2-norm, and their limits')
    right = [row for row in rows if is_right(row)]
    for op in ('paper', 'wkv'):
        row = Row(op, 2, 196, 64, 'fp32')
        with tempfile.TemporaryDirectory() as folder:
            errors = Peer(row, folder).errors(row)
        print(f'the peer of {op}: {", ".join(f"{found:.1e}" for found in errors)}')
    if right and not args.check_only:
        print_times(right, gpu['copy'])
    if len(right) < len(rows):
        sys.exit(f'error: {len(rows) - len(right)} rows are wrong; they were not timed')


if __name__ == '__main__':
    main()
