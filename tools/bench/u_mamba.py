"""U-Mamba on a GPU: a step of training, its memory, and how much of it Mamba takes.

A step is forward, a loss of all resolutions, backward, as nnU-Net trains: fp16 autocast, in which
the Mamba layers stay in fp32, cudnn.benchmark, batches and patches of the paper. Beside the network
stands the same with the published mixer (tools/bench/vim_models.py describes its steps), by
mamba-ssm's scan where it is installed, and by this package's. "layers" are all Mamba layers alone,
forward and backward, on random maps of their sizes, replayed as a CUDA graph: in a step the
convolutions give Python the time to be ahead.

Each Mamba layer is checked first, with one sample of at most 65536 positions: the result and every
gradient in fp32 against plain PyTorch in fp64, with at most four times the error of plain PyTorch
in fp32. What is wrong is not timed, and ends with 1.

  python tools/bench/u_mamba.py --rows CT
  python tools/bench/u_mamba.py --compile      the networks by torch.compile, as nnU-Net trains
"""

import argparse
import copy
import gc
import math
import sys
from typing import NamedTuple

import torch
from ss2d_gpu import graphed
from torch import Tensor, nn
from vim_models import published_direction, scan_of_mamba_ssm

from vmamba_mm.families.u_mamba import total_strides
from vmamba_mm.layers import MambaMixer
from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.models import UMamba
from vmamba_mm.models.u_mamba import MambaLayer
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import relative_error

#: of fp32, that plain PyTorch may stay below by chance
FLOOR = 1e-5
#: of the maps in a check
MAX_POSITIONS = 65536


class Row(NamedTuple):
    name: str
    arch: str
    num_classes: int
    in_channels: int
    batch: int
    size: tuple[int, ...]


ROWS = [Row('CT, Bot', 'bot_abdomen', 14, 1, 2, (40, 224, 192)),
        Row('CT, Enc', 'enc_abdomen_ct', 14, 1, 2, (40, 224, 192)),
        Row('128x128x128, Bot', 'bot_abdomen', 14, 1, 2, (128, 128, 128)),
        Row('microscopy, Enc', 'enc_microscopy', 3, 3, 12, (512, 512))]


class PublishedMixer(MambaMixer):
    """:class:`MambaMixer`, of which it has the parameters, step by step."""

    scan = staticmethod(selective_scan)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        xz = (self.in_proj.weight @ x.flatten(0, 1).T).view(-1, batch, length).transpose(0, 1)
        return self.out_proj(published_direction(self, xz).transpose(1, 2))


def publish(model: nn.Module, scan=selective_scan) -> nn.Module:
    """The model with :class:`PublishedMixer` in each Mamba layer, with the same parameters."""
    for layer in mamba_layers(model):
        mixer = PublishedMixer(layer.mamba.in_proj.in_features).to(layer.mamba.D)
        mixer.load_state_dict(layer.mamba.state_dict())
        mixer.scan = scan
        layer.mamba = mixer
    return model


def mamba_layers(model: nn.Module) -> list[MambaLayer]:
    return [module for module in model.modules() if isinstance(module, MambaLayer)]


def map_shapes(model: UMamba, batch: int, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of what each Mamba layer receives."""
    stages = range(len(model.encoder.stages)) if model.mamba_layer is None else (-1,)
    if model.mamba_layer is None:
        stages = [i for i in stages if isinstance(model.encoder.mamba_layers[i], MambaLayer)]
    strides, features = total_strides(model.arch), model.arch['features_per_stage']
    return [(batch, features[i], *(n // step for n, step in zip(size, strides[i], strict=True)))
            for i in stages]


# --- correctness --------------------------------------------------------------------------------

def with_gradients(layer: MambaLayer, x: Tensor, up: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], up)]


def plain_layer(layer: MambaLayer, dtype: torch.dtype) -> MambaLayer:
    """A copy in plain PyTorch."""
    def scan(*args, **kwargs):
        return selective_scan(*args, **kwargs, backend='chunked')

    return publish(nn.ModuleList([copy.deepcopy(layer).to(dtype)]), scan)[0]


def is_right(layer: MambaLayer, shape: tuple[int, ...]) -> bool:
    sizes = list(shape[2:])
    while math.prod(sizes) > MAX_POSITIONS:
        sizes[sizes.index(max(sizes))] //= 2
    rng = torch.Generator(next(layer.parameters()).device).manual_seed(0)
    x, up = torch.randn(2, 1, shape[1], *sizes, generator=rng, device=rng.device)
    exact = with_gradients(plain_layer(layer, torch.float64), x.double(), up.double())
    plain = with_gradients(plain_layer(layer, torch.float32), x, up)
    names = ('y', 'x', *(name for name, _ in layer.named_parameters()))
    wrong = []
    for name, y, other, right in zip(names, with_gradients(layer, x, up), plain, exact,
                                     strict=True):
        error, limit = relative_error(y, right), max(FLOOR, relative_error(other, right))
        if not error <= 4 * limit:
            wrong.append(f'{name} {error:.1e} of {4 * limit:.1e}')
    if wrong:
        print(f'  WRONG at {shape}: {", ".join(wrong)}')
    return not wrong


# --- time ---------------------------------------------------------------------------------------

def make(row: Row, device: str) -> UMamba:
    torch.manual_seed(0)
    return UMamba(row.arch, row.num_classes, row.in_channels, deep_supervision=True) \
        .to(device).train()


def step_of(network: nn.Module, row: Row, device: str):
    """A function that runs a step."""
    x = torch.randn(row.batch, row.in_channels, *row.size, device=device)
    parameters = [p for p in network.parameters()]

    def step():
        with torch.autocast(device, torch.float16 if device == 'cuda' else torch.bfloat16):
            loss = sum(y.float().square().mean() for y in network(x))
        torch.autograd.grad(loss, parameters)

    return step


def layers_step(model: UMamba, row: Row, device: str):
    """A function that runs all Mamba layers alone, forward and backward."""
    maps = [(layer, torch.randn(shape, device=device, requires_grad=True)) for layer, shape in
            zip(mamba_layers(model), map_shapes(model, row.batch, row.size), strict=True)]
    ups = [torch.randn_like(x) for _, x in maps]

    def step():
        for (layer, x), up in zip(maps, ups, strict=True):
            torch.autograd.grad(layer(x), [x, *layer.parameters()], up)

    return step


def measure(model: UMamba, row: Row, compile: bool) -> tuple[float, float, float]:
    """ms of a step and of the layers alone, GiB that a step holds at most."""
    layers = median_ms(graphed(layers_step(model, row, 'cuda')))
    gc.collect()  # or the graph's memory would count in the peak
    torch.cuda.empty_cache()
    step = step_of(torch.compile(model) if compile else model, row, 'cuda')
    for _ in range(3):
        step()
    _, peak = held_and_peak(step, True)
    return median_ms(step, spend=1000), layers, peak / 2**30


def run(row: Row, compile: bool) -> bool:
    print(f'{row.name}: batch {row.batch}, {"x".join(map(str, row.size))}'
          f'{", compiled" if compile else ""}', flush=True)
    model = make(row, 'cuda')
    shapes = map_shapes(model, row.batch, row.size)
    if not all([is_right(*pair) for pair in zip(mamba_layers(model), shapes, strict=True)]):
        return False
    ways = [('this package', model)]
    try:
        ways.append(("published, mamba-ssm's scan", publish(make(row, 'cuda'),
                                                            scan_of_mamba_ssm())))
    except ModuleNotFoundError:
        pass
    ways.append(("published, this package's scan", publish(make(row, 'cuda'))))
    for name, network in ways:
        torch.cuda.empty_cache()
        step, layers, peak = measure(network, row, compile)
        print(f'  {name:32}step {step:8.2f} ms, peak {peak:5.2f} GiB, layers {layers:7.2f} ms, '
              f'{layers / step:.1%}', flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='', metavar='TEXT', help='rows whose name has this')
    parser.add_argument('--compile', action='store_true', help='by torch.compile')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('error: torch finds no GPU')
    rows = [row for row in ROWS if args.rows in row.name]
    if not rows:
        sys.exit(f'error: no row has {args.rows!r} in its name; there are '
                 f'{", ".join(repr(row.name) for row in ROWS)}')
    torch.backends.cudnn.benchmark = True
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16 autocast')
    sys.exit(int(not all([run(row, args.compile) for row in rows])))


if __name__ == '__main__':
    main()
