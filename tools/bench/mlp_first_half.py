"""GELU of a product with a bias, the first half of an MLP, on a GPU: correctness and speed.

The rows are those of the stages of VMamba, VSSD and others at batch 128 and 224x224. Each is
checked first against fp64, at up to 10,000 of its rows. What is wrong is not timed and makes the
command fail. Beside the kernel of sm_90, in all of its cuts, stand a product with GELU after it,
which other GPUs have, and PyTorch's own linear and gelu; all as replays of CUDA graphs.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from ss2d_gpu import describe_gpu, graphed

from vmamba_mm.mm.measuring import median_ms
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.fused.mlp import hidden

ROWS = ((401408, 384, 96), (100352, 768, 192), (25088, 1536, 384), (401408, 256, 64),
        (100352, 512, 128), (25088, 1024, 256), (6272, 2048, 512), (25088, 1536, 320))
DTYPE = torch.float16
CHECKED = 10_000


def make(rows, width, dim):
    x, w, b = (torch.randn(size, device='cuda') for size in ((rows, dim), (width, dim), (width,)))
    return [t.to(DTYPE) for t in (x, w / dim**0.5, b)]


def use(shape):
    """``None`` for what is chosen."""
    hidden.force = shape
    launch.forget()


def layer(inputs, keep=False):
    return hidden.hidden_layer(*inputs, keep)


def is_right(inputs, shape):
    use(shape)
    x, w, b = inputs
    inner, result = layer((x[-CHECKED:], w, b), keep=True)
    exact = F.linear(x[-CHECKED:].double(), w.double(), b.double())
    for found, right in ((inner, exact), (result, F.gelu(exact))):
        error = ((found.double() - right).norm() / right.norm()).item()
        if not error <= 4e-4:
            print(f'{shape}: error {error:.1e}')
            return False
    return True


def by_cublas(inputs):
    x, w, b = inputs
    inner = torch.addmm(b, x, w.T)
    hidden.gelu_launch(x.get_device(), x.dtype, inner.numel())(x=inner.data_ptr(),
                                                               y=inner.data_ptr())
    return inner


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available() or not launch.has_groups_of_warps(0):
        raise SystemExit('error: this needs a GPU of compute capability 9.0, as an H100 or H200')
    gpu = describe_gpu()
    copy = gpu['copy']
    print(f'{gpu["name"]}, copy {copy / 1e9:.2f} TB/s; torch {torch.__version__}; {DTYPE}, ms in '
          f'CUDA graphs; wide / tiles / stages: a cut of the kernel, * the one that is chosen\n'
          f'{"rows, columns, depth":>22}{"floor":>8}{"torch":>8}{"cuBLAS":>8}'
          + ''.join(f'{"/".join(map(str, shape)):>9}' for shape in hidden.SHAPES)
          + f'{"kept":>9}{"cuBLAS":>8}')
    wrong = False
    for row in ROWS:
        inputs, (rows, width, dim) = make(*row), row
        use(None)
        chosen = hidden.shape_for(0, DTYPE, *row)
        times = []
        most = launch.device_limits(0)[2]
        for shape in hidden.SHAPES:
            if shape.shared(dim) > most:
                times.append(f'{"-":>9}')
                continue
            if not is_right(inputs, shape):
                wrong = True
                times.append(f'{"wrong":>9}')
                continue
            ms = median_ms(graphed(lambda: layer(inputs)), in_a_row=10)  # noqa: B023
            times.append(f'{ms:8.4f}{"*" if shape == chosen else " "}')
        use(None)
        kept = median_ms(graphed(lambda: layer(inputs, True)), in_a_row=10)  # noqa: B023

        def keep_by_cublas(inputs=inputs):
            x, w, b = inputs
            inner = torch.addmm(b, x, w.T)
            result = torch.empty_like(inner)
            hidden.gelu_launch(x.get_device(), x.dtype, inner.numel())(x=inner.data_ptr(),
                                                                       y=result.data_ptr())

        peers = [median_ms(graphed(call), in_a_row=10) for call in (
            lambda: F.gelu(F.linear(*inputs)), lambda: by_cublas(inputs), keep_by_cublas)]  # noqa: B023
        floor = 2 * (rows * (width + dim) + width * dim) / copy
        print(f'{", ".join(map(str, row)):>22}{floor:8.4f}{peers[0]:8.4f}{peers[1]:8.4f}'
              + ''.join(times) + f'{kept:9.4f}{peers[2]:8.4f}', flush=True)
    if wrong:
        sys.exit('error: a cut is wrong; it was not timed')


if __name__ == '__main__':
    main()
