"""MambaIR on a GPU: super-resolution and training, beside the public code's chain of ops.

The lightweight model for x2 restores an image of 1280x720 from one of 640x360. And the classic
model for x4 does a step of training on patches of 64x64, which become 256x256, on 32 of them, the
batch of the recipe, and on 4, the part of each of its 8 GPUs: forward, L1, backward and a fused
Adam, with a fixed loss scale and a learning rate of 0, so that every step does the same work. All
in fp16 autocast with cudnn.benchmark, and without drop path. Beside ours stands the same network,
with the same weights, run step by step as the public code (github.com/csguoh/MambaIR) runs it: four
copies of every map, two of them flipped, products for dt, B and C by einsum, a scan in fp32 by this
package's kernel and, where it is installed, by mamba-ssm's, flips and transposes back, sums, norm
and gate as ops of their own.

First the result for a small image, and the gradient of every parameter, are compared with the
public chain in fp64 and plain PyTorch: the error may be at most four times the largest that the
public chain under autocast has by this parameter of any block, as some are of six numbers. What is
wrong is not timed, and ends with 1.

  python tools/bench/mambair.py
  python tools/bench/mambair.py --device cpu --shrink 16     to try the tool out, in bf16
"""

import argparse
import copy
import functools
import gc
import re
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vm_unet import FLOOR, HALF, SCALE, _mix, _norm, ways

from vmamba_mm.mm.measuring import cpu_name, held_and_peak, median
from vmamba_mm.models import MambaIR
from vmamba_mm.models.restorer import run_tail
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import relative_error


class Setting(NamedTuple):
    name: str
    arch: dict
    batch: int
    height: int
    width: int
    trains: bool


def make_settings(shrink: int) -> list[Setting]:
    """All; else as small as ``shrink`` says."""
    def small(base):
        return dict(base=base) if shrink == 1 else dict(base=base, depths=(1,), embed_dims=30)

    side = max(8, 64 // shrink)
    return [Setting('light x2, 1280x720', small('light_x2'), 1, max(8, 360 // shrink),
                    max(8, 640 // shrink), False),
            *(Setting('classic x4, a step of training', small('sr_x4'), batch, side, side, True)
              for batch in ((4, 32) if shrink == 1 else (4,)))]


class PublishedMambaIR(nn.Module):
    """A :class:`MambaIR`, whose modules it has, run step by step.

    Args:
        scan: a function of the arguments of ``selective_scan``.

    Shape: as of :class:`MambaIR`.
    """

    def __init__(self, net: MambaIR, scan=selective_scan):
        super().__init__()
        self.net = net
        self.scan = scan

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = (x - net.mean.to(x.dtype)) * net.img_range
        first = net.conv_first(x)
        y = _norm(net.patch_embed['norm'], first.permute(0, 2, 3, 1).contiguous())
        for group in net.layers:
            before = y
            for block in group.residual_group['blocks']:
                y = y * block.skip_scale + _mix(block.self_attention, _norm(block.ln_1, y),
                                                self.scan)
                branch = block.conv_blk(_norm(block.ln_2, y).permute(0, 3, 1, 2).contiguous())
                y = y * block.skip_scale2 + branch.permute(0, 2, 3, 1).contiguous()
            y = group.conv(y.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1) + before
        y = net.conv_after_body(_norm(net.norm, y).permute(0, 3, 1, 2).contiguous()) + first
        y = run_tail(net, y, x, net.arch['upsampler'])
        return y / net.img_range + net.mean.to(x.dtype)


def make(setting: Setting, device: str, scan=None) -> nn.Module:
    """Ours, or with a ``scan`` the published one, always with the same random weights."""
    torch.manual_seed(0)
    model = MambaIR(setting.arch).to(device)
    if scan is not None:
        return PublishedMambaIR(model, scan)
    return model.to(memory_format=torch.channels_last)


def make_data(setting: Setting, device: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator(device).manual_seed(1)
    scale = 4 if setting.trains else 2
    return (torch.rand(setting.batch, 3, height, width, generator=rng, device=device),
            torch.rand(setting.batch, 3, scale * height, scale * width, generator=rng,
                       device=device))


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return SCALE * F.l1_loss(y, target.to(y.dtype))


def call_of(network: nn.Module, setting: Setting, device: str):
    """A function that restores images, or runs a step of training."""
    images, target = make_data(setting, device, setting.height, setting.width)
    if not setting.trains:
        @torch.no_grad()
        def restore():
            with torch.autocast(device, HALF[device]):
                return network(images)

        return restore
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)

    def step():
        with torch.autocast(device, HALF[device]):
            y = network(images)
        scaler.scale(loss_of(y, target) / SCALE).backward()
        scaler.step(optimizer)
        scaler.update(SCALE)
        optimizer.zero_grad(set_to_none=True)

    return step


def results(network: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    """The restored images, and every parameter's gradient by the loss."""
    y = network(images)
    return [y.detach(), *torch.autograd.grad(loss_of(y, target), list(network.parameters()))]


def is_right(setting: Setting, device: str) -> bool:
    """On at most 4 images of 32x40, or as small as the setting's."""
    setting = setting._replace(batch=min(4, setting.batch))
    size = min(32, setting.height), min(40, setting.width)
    data = make_data(setting, device, *size)
    ours = make(setting, device).eval()
    names = ['the result', *(name for name, _ in ours.named_parameters())]
    exact = PublishedMambaIR(copy.deepcopy(ours).double(),
                             functools.partial(selective_scan, backend='chunked'))
    exact = results(exact, *(t.double() for t in data))
    with torch.autocast(device, HALF[device]):
        found = results(ours, *data)
        theirs = results(make(setting, device, selective_scan).eval(), *data)
    floor, limits, kinds = FLOOR * torch.finfo(HALF[device]).eps, {}, [
        re.sub(r'\d+', '*', name) for name in names]
    for kind, other, right in zip(kinds, theirs, exact, strict=True):
        limits[kind] = max(limits.get(kind, 4 * floor), 4 * relative_error(other, right))
    errors = {name: (relative_error(y, right), limits[kind])
              for name, kind, y, right in zip(names, kinds, found, exact, strict=True)}
    wrong = [name for name, (error, limit) in errors.items() if not error <= limit]
    nearest = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    shown = ', '.join(f'{name} {errors[name][0]:.1e} of {errors[name][1]:.1e}'
                      for name in dict.fromkeys(wrong[:5] or ('the result', nearest)))
    print(f'  {f"WRONG, {len(wrong)} of {len(errors)}" if wrong else "right, the error"}: {shown}',
          flush=True)
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=tuple(HALF), default='cuda')
    parser.add_argument('--shrink', type=int, default=1, metavar='N',
                        help='divide sides by N and make the networks small, to try the tool out')
    args = parser.parse_args()
    if args.shrink < 1:
        sys.exit(f'error: --shrink must be at least 1, got {args.shrink}')
    device, on_gpu = args.device, args.device == 'cuda'
    if on_gpu and not torch.cuda.is_available():
        sys.exit('error: torch finds no GPU; --device cpu --shrink 16 tries the tool out')
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    print(f'{torch.cuda.get_device_name() if on_gpu else cpu_name()}, torch {torch.__version__}, '
          f'{str(HALF[device]).removeprefix("torch.")} autocast', flush=True)
    for setting in make_settings(args.shrink):
        print(f'{setting.name}: batch {setting.batch}, {setting.height}x{setting.width}',
              flush=True)
        if not is_right(setting, device):
            sys.exit('A result is wrong; nothing more is timed.')
        ours = None
        for name, scan in ways().items():
            gc.collect()  # or what the way before had would count in the peak
            if on_gpu:
                torch.cuda.empty_cache()
            call = call_of(make(setting, device, scan).train(setting.trains), setting, device)
            ms, bounds = median(call, on_gpu, spend=1500), held_and_peak(call, on_gpu)
            peak = float('nan') if bounds is None else bounds[1] / 2**30
            ours = ours or (ms, peak)
            print(f'  {name:32}{ms:8.2f} ms, peak {peak:5.2f} GiB; the time of ours times '
                  f'{ms / ours[0]:.2f}, its memory times {peak / ours[1]:.2f}', flush=True)


if __name__ == '__main__':
    main()
