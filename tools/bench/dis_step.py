"""DiS-S/2 on latents of ImageNet: a step of training on a GPU beside the public chain of ops.

Batch 128 of 4x32x32, fp16 autocast: noise is added, the loss has the variance's part, and all
gradients are made; the optimizer is not part of it. The chain is that of tools/bench/vim_models.py:
a copy for the backward direction, and for each direction a convolution, products and a scan, by
mamba-ssm's kernel where it is installed, and by this package's.

The noise that is predicted and every gradient are compared first, in fp32. What is wrong is not
timed, and ends with 1.
"""

import argparse
import gc
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vim_models import publish, scan_of_mamba_ssm

from vmamba_mm.heads.diffusion import GaussianDiffusion
from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.models import DiS
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import relative_error

BATCH, CHECKED = 128, 8
MAX_ERROR = 2e-3  # of sums in another order, over 25 blocks and back


def make(arch: str | Mapping[str, Any], device: str, scan=None) -> DiS:
    """Ours, or the public chain by a scan."""
    torch.manual_seed(0)
    model = DiS(arch).to(device)
    with torch.no_grad():  # nothing is zero, as at the start
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model if scan is None else publish(model, scan)


def make_batch(model: DiS, count: int, device: str) -> tuple[Tensor, ...]:
    """Latents, noise, times and classes."""
    torch.manual_seed(1)
    size = model.arch['image_size']
    x, noise = torch.randn(2, count, model.in_channels, size, size, device=device)
    t = torch.randint(1000, (count,), device=device)
    return x, noise, t, torch.randint(model.num_classes + 1, (count,), device=device)


def loss_of(model: DiS, diffusion: GaussianDiffusion, batch: tuple[Tensor, ...]
            ) -> tuple[Tensor, Tensor]:
    """The loss, and what the model gives."""
    x, noise, t, labels = batch
    x_t = diffusion.add_noise(x, noise, t)
    out = model(x_t, t, labels)
    return diffusion.losses(out.to(x.dtype), x, noise, t, x_t)['loss'].mean(), out


def results(model: DiS, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the model gives, and the gradients of the loss by name."""
    loss, out = loss_of(model, GaussianDiffusion(), batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, grads, strict=True), output=out)


def largest_error(ours: DiS, published: DiS, batch: tuple[Tensor, ...]) -> tuple[float, str]:
    found, expected = results(ours, batch), results(published, batch)
    return max((relative_error(found[name], expected[name]), name) for name in expected)


def time_step(model: DiS, batch: tuple[Tensor, ...]) -> tuple[float, int]:
    """ms of a step, and its peak memory in bytes."""
    scaler, diffusion = torch.amp.GradScaler('cuda'), GaussianDiffusion()

    def step():
        with torch.autocast('cuda', torch.float16):
            loss, _ = loss_of(model, diffusion, batch)
        scaler.scale(loss).backward()
        model.zero_grad(set_to_none=True)

    step()
    _, peak = held_and_peak(step, on_gpu=True)
    return median_ms(step), peak


def ways() -> dict[str, object]:
    """{what: its scan}, None for ours, which comes first."""
    found = {'this package': None}
    try:
        found["public chain, mamba-ssm's scan"] = scan_of_mamba_ssm()
    except ModuleNotFoundError:
        pass
    return {**found, "public chain, this package's scan": selective_scan}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='small_p2', help='of DiS (default: %(default)s)')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('DiS is timed on a GPU, and torch finds none')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16 autocast')
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    ours, published = (make(args.arch, 'cuda', scan) for scan in (None, selective_scan))
    error, name = largest_error(ours, published, make_batch(ours, CHECKED, 'cuda'))
    print(f'  largest error {error:.1e}, of {name}', flush=True)
    if not error <= MAX_ERROR:
        sys.exit('wrong: not timed')
    del ours, published
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    first = None
    for what, scan in ways().items():
        model = None
        gc.collect()  # or what the way before had would count in the peak
        torch.cuda.empty_cache()
        model = make(args.arch, 'cuda', scan).train()
        ms, peak = time_step(model, make_batch(model, BATCH, 'cuda'))
        first = first or ms
        print(f'  {what:34}{ms:8.2f} ms, peak {peak / 2**30:5.2f} GiB, {BATCH / ms * 1000:6.0f} '
              f'images/s, {ms / first:.2f} times the time of ours', flush=True)


if __name__ == '__main__':
    main()
