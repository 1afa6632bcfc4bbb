"""State space duality on a CPU: the op ssd, and ways to write it in a few lines of PyTorch.

Four ways take turns, in fp32: a loop over tokens; a loop over chunks of 64; the paper's listing,
all chunks at a time by einsum; and vmamba_mm.ops.ssd. Results and all gradients are compared first,
and a wrong one ends the run. Times are those of the processor, of one thread, and the best round
counts, so that other programs matter little. Memory is what a forward and backward take beyond
their inputs.

Example: python tools/bench/ssd_cpu.py --rounds 20
"""

import argparse
import platform
import sys
import time

import torch
import torch.nn.functional as F
from ways import run, worst_error

import vmamba_mm
from vmamba_mm.mm.measuring import cpu_name, held_and_peak
from vmamba_mm.ops import ssd
from vmamba_mm.ops.ssd import reference

#: (batch, L, heads, P, groups, N): images in two stages, texts with few states and with many.
SHAPES = ((4, 196, 12, 64, 1, 64), (8, 49, 24, 32, 1, 64), (1, 2048, 12, 64, 1, 64),
          (1, 512, 24, 64, 1, 128))
LIMIT = 1e-4


def make(batch, length, heads, dim, groups, state):
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng)

    return dict(x=randn(batch, length, heads, dim), dt=randn(batch, length, heads),
                A=-randn(heads).exp(), B=randn(batch, length, groups, state),
                C=randn(batch, length, groups, state), D=randn(heads), dt_bias=randn(heads) - 1)


def by_reference(mode):
    def run(x, dt, A, B, C, D, dt_bias):
        return reference.forward(x, dt, A, B, C, D, dt_bias, None, None, None, True, 0.0,
                                 float('inf'), False, False, mode)[0]

    return run


def by_listing(x, dt, A, B, C, D, dt_bias, chunk_len=64):
    """Listing 1 of arXiv 2405.21060, with groups, softplus and skip."""
    length, heads = x.shape[1:3]
    dt = F.softplus(dt + dt_bias)
    tokens = x * dt[..., None], dt * A, *(t.repeat_interleave(heads // t.shape[2], 2)
                                          for t in (B, C))
    drive, a, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, -length % chunk_len)).unflatten(
        1, (-1, chunk_len)) for t in tokens)
    a = a.permute(0, 3, 1, 2)
    sums = a.cumsum(-1)
    y = torch.einsum('bclhn,bcshn,bhcls,bcshp->bclhp', C, B, decays(a), drive)
    states = torch.einsum('bclhn,bhcl,bclhp->bchpn', B, (sums[..., -1:] - sums).exp(), drive)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    states = torch.einsum('bhzc,bchpn->bzhpn', decays(F.pad(sums[..., -1], (1, 0))), states)
    y = y + torch.einsum('bclhn,bchpn,bhcl->bclhp', C, states[:, :-1], sums.exp())
    return y.flatten(1, 2)[:, :length] + D[:, None] * x


def decays(a):
    """(..., T) -> (..., T, T), the mask of section 3 for logarithms of decays."""
    sums = a.cumsum(-1)
    unseen = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(unseen, -torch.inf).exp()


def by_op(**inputs):
    return ssd(**inputs, dt_softplus=True)


WAYS = {'loop over tokens': by_reference('recurrent'), 'loop over chunks': by_reference('chunked'),
        'listing': by_listing, 'ssd': by_op}


def verify(shape) -> float:
    """The largest relative error of the ways beside the loop in fp64, at a part of the length."""
    inputs = make(1, min(shape[1], 100), *shape[2:])
    return worst_error(WAYS.values(), WAYS['loop over tokens'], inputs)


def time_in_turns(inputs, with_backward: bool, rounds: int) -> dict[str, float]:
    """The least milliseconds of each way."""
    best = dict.fromkeys(WAYS, float('inf'))
    for _ in range(rounds + 1):
        for name, way in WAYS.items():
            start = time.process_time()
            run(way, inputs, with_backward)
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--shrink', type=int, default=1, metavar='N',
                        help='divide L and P by N, to try the tool out')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    shapes = [(batch, max(1, length // args.shrink), heads, max(1, dim // args.shrink), *rest)
              for batch, length, heads, dim, *rest in SHAPES]
    print(f'{platform.processor() or platform.machine()} ({cpu_name()}), 1 thread, fp32, eager; '
          f'torch {torch.__version__}, vmamba_mm {vmamba_mm.__version__}')
    worst = max(map(verify, shapes))
    print(f'results and gradients beside the loop in fp64: relative error {worst:.1e} '
          f'(allowed {LIMIT:.0e})', flush=True)
    if not worst <= LIMIT:
        sys.exit('A result is wrong; nothing was timed.')
    for shape in shapes:
        inputs = make(*shape)
        print('batch {}, L {}, heads {}, P {}, groups {}, N {}'.format(*shape))
        forward, both = (time_in_turns(inputs, with_backward, args.rounds)
                         for with_backward in (False, True))
        for name, way in WAYS.items():
            bounds = held_and_peak(lambda: run(way, inputs, True), on_gpu=False)  # noqa: B023
            memory = 'unknown' if bounds is None else f'{(bounds[1] - bounds[0]) / 2 ** 20:.0f} MiB'
            print(f'  {name:18s} forward {forward[name]:7.1f} ms, with backward {both[name]:7.1f} '
                  f'ms ({forward[name] / forward["ssd"]:5.2f} and {both[name] / both["ssd"]:5.2f} '
                  f'times ssd), {memory}', flush=True)


if __name__ == '__main__':
    main()
