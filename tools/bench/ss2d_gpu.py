"""Time the middle of SS2D, from SiLU to the output of its norm, on an NVIDIA GPU.

Each row is checked against the fp64 reference first. Beside the kernels: the plain PyTorch
implementation, in the same run, and the time that reading x and writing y once takes at the speed
of a device-to-device copy.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from vmamba_mm.ops import ss2d_scan, ss2d_scan_norm
from vmamba_mm.ops.ss2d_scan import reference
from vmamba_mm.testing import relative_error, ss2d_scan_inputs

# name, batch, channels D, height, width, states N, rank R
ROWS = [('s1l8 stage 1', 128, 96, 56, 56, 1, 6), ('s1l8 stage 2', 128, 192, 28, 28, 1, 12),
        ('s1l8 stage 3', 128, 384, 14, 14, 1, 24), ('s1l8 stage 4', 128, 768, 7, 7, 1, 48),
        ('s2l5 stage 1', 128, 192, 56, 56, 1, 6), ('s2l5 stage 2', 128, 384, 28, 28, 1, 12),
        ('s2l5 stage 3', 128, 768, 14, 14, 1, 24), ('s2l5 stage 4', 128, 1536, 7, 7, 1, 48),
        ('one 800x1280 image', 1, 96, 200, 320, 1, 6),
        ('vanilla stage 1', 128, 192, 56, 56, 16, 6)]


def median_ms(function, repeats=20):
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graphed(function):
    """Replays of a CUDA graph: the GPU's time without the launches'."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_speed():
    """Bytes read and written by a large copy, per millisecond."""
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def make_inputs(batch, dim, height, width, state, rank):
    inputs = ss2d_scan_inputs(batch, dim, height, width, state=state, rank=rank, device='cuda')
    inputs['x'] = inputs['x'].half().contiguous(memory_format=torch.channels_last)
    norm = torch.randn(dim, device='cuda'), torch.randn(dim, device='cuda')
    return inputs, norm


def check(dim, height, width, state, rank):
    """Error of the normalised map against fp64, with a batch that the reference can hold."""
    inputs, norm = make_inputs(2, dim, height, width, state, rank)
    y = reference.forward(*(t.double() for t in inputs.values()), torch.float64)
    expected = F.layer_norm(y.permute(0, 2, 3, 1), (dim,), *(t.double() for t in norm))
    with torch.no_grad():
        found = ss2d_scan_norm(*inputs.values(), *norm, backend='cuda').permute(0, 2, 3, 1)
    error = relative_error(found, expected)
    if not error < 3e-3:
        raise SystemExit(f'wrong result: relative error {error:.1e} at D={dim}, N={state}')
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plain', action='store_true', help='time plain PyTorch too (slow)')
    parser.add_argument('--backward', action='store_true', help='forward and backward too')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('error: torch finds no NVIDIA GPU here')
    speed = copy_speed()
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16, medians in ms; '
          f'copy {speed / 1e9:.2f} TB/s')
    print(f'{"":20}{"error":>9}{"graph":>8}{"eager":>8}{"plain":>8}{"fwd+bwd":>9}'
          f'{"bytes floor":>13}{"graph/floor":>13}')
    for name, batch, dim, height, width, state, rank in ROWS:
        error = check(dim, min(height, 56), min(width, 56), state, rank)
        inputs, norm = make_inputs(batch, dim, height, width, state, rank)

        def forward(backend='cuda', inputs=inputs, norm=norm):
            with torch.no_grad():
                return ss2d_scan_norm(*inputs.values(), *norm, backend=backend)

        eager, graph = median_ms(forward), median_ms(graphed(forward))
        plain = median_ms(lambda: forward('chunked'), 3) if args.plain else float('nan')  # noqa: B023
        both = float('nan')
        if args.backward:
            leaves = [t.requires_grad_() for t in inputs.values()]
            both = median_ms(lambda: torch.autograd.grad(  # noqa: B023
                ss2d_scan(*leaves).float().sum(), leaves), 3)  # noqa: B023
        floor = 2 * inputs['x'].nbytes / speed
        print(f'{name:20}{error:9.1e}{graph:8.3f}{eager:8.3f}{plain:8.1f}{both:9.1f}'
              f'{floor:13.3f}{graph / floor:13.1f}', flush=True)


if __name__ == '__main__':
    main()
