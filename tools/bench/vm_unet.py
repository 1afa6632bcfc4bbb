"""VM-UNet on a GPU: a step of training and its memory, beside the public code's chain of ops.

The published setting for ISIC: 256x256, batch 32, one class, drop path 0.2, BCE and Dice. A step is
forward, loss, backward and a fused AdamW, in fp16 autocast with a fixed loss scale and
cudnn.benchmark; the learning rate is 0, so that every step does the same work. Ours has
channels-last images. Beside it stands the same network, with the same weights, run step by step as
the public code (github.com/JCruan519/VM-UNet) runs it: four copies of every map, two of them
flipped, products for dt, B and C by einsum, a scan in fp32 by this package's kernel and, where it
is installed, by mamba-ssm's, flips and transposes back, sums, norm and gate as ops of their own.

First the logits of the batch's last image, and the gradient of every parameter by its loss, are
compared with the public chain in fp64 and plain PyTorch: the error may be at most four times that
of the public chain under autocast. What is wrong is not timed, and ends with 1.

  python tools/bench/vm_unet.py
  python tools/bench/vm_unet.py --device cpu --shrink 8      to try the tool out, in bf16
"""

import argparse
import copy
import functools
import gc
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vim_models import scan_of_mamba_ssm

from vmamba_mm.layers import SS2D, MergeDownsample, PatchExpand
from vmamba_mm.mm.measuring import cpu_name, held_and_peak, median
from vmamba_mm.models import VMUNet
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import Segmentor, relative_error

#: of the loss, which keeps gradients in the range of fp16
SCALE = 2.0**12
#: by the rounding of the dtype: an error that the public chain may stay below by chance
FLOOR = 4
#: what autocast casts to; convolutions of a CPU are slow in fp16
HALF = dict(cuda=torch.float16, cpu=torch.bfloat16)


class Setting(NamedTuple):
    arch: dict
    batch: int
    side: int


def make_setting(shrink: int) -> Setting:
    """The published one; else as small as ``shrink`` says and the network allows."""
    if shrink == 1:
        return Setting(dict(base='l2'), 32, 256)
    # The last norm has a quarter of the channels; one of few channels magnifies rounding.
    arch = dict(base='l2', embed_dims=max(24, 96 // shrink), depths=(1,) * 4,
                decoder_depths=(1,) * 4)
    return Setting(arch, max(2, 32 // shrink), max(32, 256 // shrink // 32 * 32))


# --- the public chain of ops --------------------------------------------------------------------

class PublishedVMUNet(nn.Module):
    """A :class:`Segmentor` of :class:`VMUNet`, whose modules it has, run step by step.

    Args:
        scan: a function of the arguments of ``selective_scan``.

    Shape: (B, 3, H, W) -> (B, classes, H, W), H and W multiples of 32.
    """

    def __init__(self, segmentor: Segmentor, scan=selective_scan):
        super().__init__()
        self.segmentor = segmentor
        self.scan = scan

    def forward(self, x: Tensor) -> Tensor:
        net = self.segmentor.backbone
        x = _norm(net.patch_embed.norm, net.patch_embed.proj(x).permute(0, 2, 3, 1))
        inputs = []
        for i, stage in enumerate(net.stages):
            if i < net.half:
                inputs.append(x)
            elif i > net.half:
                x = _expand(stage.upsample, x + inputs[2 * net.half - i])
            for block in stage.blocks:
                x = x + block.drop_path(_mix(block.ssm, _norm(block.norm1, x), self.scan))
            if i < net.half - 1:
                x = _merge(stage.downsample, x)
        x = _expand(net.final_up, x).permute(0, 3, 1, 2)
        return self.segmentor.decode_head['conv_seg'](x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return nn.LayerNorm.forward(norm, x)  # PyTorch's, not this package's kernel


def _merge(layer: MergeDownsample, x: Tensor) -> Tensor:
    corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return layer.reduction(_norm(layer.norm, torch.cat(corners, dim=-1)))


def _expand(layer: PatchExpand, x: Tensor) -> Tensor:
    batch, height, width, _ = x.shape
    f = layer.factor
    x = layer.expand(x).view(batch, height, width, f, f, -1).permute(0, 1, 3, 2, 4, 5)
    return _norm(layer.norm, x.reshape(batch, f * height, f * width, -1))


def _mix(ssm: SS2D, x: Tensor, scan) -> Tensor:
    x, z = ssm.in_proj(x).chunk(2, dim=-1)
    y = _scan_routes(ssm, F.silu(ssm.conv2d(x.permute(0, 3, 1, 2).contiguous())), scan)
    y = y.transpose(1, 2).contiguous().view(x.shape)
    return ssm.out_proj(_norm(ssm.out_norm, y) * F.silu(z))


def _scan_routes(ssm: SS2D, x: Tensor, scan) -> Tensor:
    """(B, D, H, W) to the sum of the routes, (B, D, L), in fp32 at least."""
    batch, dim, height, width = x.shape
    rank, state = ssm.dt_projs_weight.shape[2], ssm.A_logs.shape[1]
    precise = torch.promote_types(x.dtype, torch.float32)
    ways = torch.stack([x.flatten(2), x.transpose(2, 3).contiguous().flatten(2)], dim=1)
    routes = torch.cat([ways, ways.flip(-1)], dim=1)  # (B, 4, D, L)
    projected = torch.einsum('bkdl,kcd->bkcl', routes, ssm.x_proj_weight)
    dt, B, C = projected.split((rank, state, state), dim=2)
    dt = torch.einsum('bkrl,kdr->bkdl', dt, ssm.dt_projs_weight)
    u, delta = (t.contiguous().to(precise).flatten(1, 2) for t in (routes, dt))
    y = scan(u, delta, -ssm.A_logs.to(precise).exp(), B.to(precise).contiguous(),
             C.to(precise).contiguous(), ssm.Ds.to(precise), z=None,
             delta_bias=ssm.dt_projs_bias.to(precise).flatten(), delta_softplus=True)
    y = y.view(routes.shape)
    reverse = y[:, 2:].flip(-1)

    def from_columns(t):
        return t.reshape(batch, dim, width, height).transpose(2, 3).contiguous().flatten(2)

    return y[:, 0] + reverse[:, 0] + from_columns(y[:, 1]) + from_columns(reverse[:, 1])


# --- models and steps ---------------------------------------------------------------------------

def make(setting: Setting, device: str, scan=None) -> nn.Module:
    """Ours, or with a ``scan`` the published one, always with the same random weights."""
    torch.manual_seed(0)
    model = Segmentor(VMUNet(setting.arch, drop_path_rate=0.2), 1).to(device)
    if scan is not None:
        return PublishedVMUNet(model, scan)
    return model.to(memory_format=torch.channels_last)


def make_data(setting: Setting, device: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Images, and masks of which about half is 1."""
    rng = torch.Generator(device).manual_seed(1)
    shape = setting.batch, setting.side, setting.side
    images, masks = (torch.randn(shape[0], c, *shape[1:], generator=rng, device=device)
                     for c in (3, 1))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout), (masks > 0).float()


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """The published loss, by logits: BCE, and one minus Dice of each image (smooth 1)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found, true = logits.sigmoid().flatten(1), masks.flatten(1)
    dice = (2 * (found * true).sum(1) + 1) / (found.sum(1) + true.sum(1) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice.mean()


def step_of(network: nn.Module, setting: Setting, device: str):
    """A function that runs a training step."""
    images, masks = make_data(setting, device, isinstance(network, Segmentor))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)

    def step():
        with torch.autocast(device, HALF[device]):
            logits = network(images)
        scaler.scale(bce_dice(logits, masks)).backward()
        scaler.step(optimizer)
        scaler.update(SCALE)
        optimizer.zero_grad(set_to_none=True)

    return step


# --- correctness --------------------------------------------------------------------------------

def results(network: nn.Module, images: Tensor, masks: Tensor) -> list[Tensor]:
    """The last image's logits, and every parameter's gradient by its loss."""
    logits = network(images)
    gradients = torch.autograd.grad(SCALE * bce_dice(logits[-1:], masks[-1:]),
                                    list(network.parameters()))
    return [logits.detach()[-1:], *gradients]


def autocast_results(network: nn.Module, setting: Setting, device: str) -> list[Tensor]:
    data = make_data(setting, device, isinstance(network, Segmentor))
    with torch.autocast(device, HALF[device]):
        return results(network.eval(), *data)  # without drop path


def is_right(setting: Setting, device: str) -> bool:
    ours = make(setting, device)
    names = ['logits', *(name for name, _ in ours.named_parameters())]
    exact = PublishedVMUNet(copy.deepcopy(ours).double().eval(),
                            functools.partial(selective_scan, backend='chunked'))
    exact = results(exact, *(t[-1:].double() for t in make_data(setting, device, False)))
    found = autocast_results(ours, setting, device)
    theirs = autocast_results(make(setting, device, selective_scan), setting, device)
    floor, errors = FLOOR * torch.finfo(HALF[device]).eps, {}
    for name, y, other, right in zip(names, found, theirs, exact, strict=True):
        errors[name] = relative_error(y, right), 4 * max(floor, relative_error(other, right))
    wrong = [name for name, (error, limit) in errors.items() if not error <= limit]
    nearest = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    shown = ', '.join(f'{name} {errors[name][0]:.1e} of {errors[name][1]:.1e}'
                      for name in dict.fromkeys(wrong[:5] or ('logits', nearest)))
    print(f'  {f"WRONG, {len(wrong)} of {len(errors)}" if wrong else "right, the error"}: {shown}',
          flush=True)
    return not wrong


# --- time ---------------------------------------------------------------------------------------

def measure(network: nn.Module, setting: Setting, device: str) -> tuple[float, float]:
    """ms of a training step, and GiB that are held at most during one; NaN if unknown."""
    on_gpu = device == 'cuda'
    step = step_of(network.train(), setting, device)
    ms = median(step, on_gpu, spend=1500)
    bounds = held_and_peak(step, on_gpu)
    return ms, float('nan') if bounds is None else bounds[1] / 2**30


def ways() -> dict[str, object]:
    """{what: its scan}, None for ours, which comes first."""
    found = {'this package': None, "published, this package's scan": selective_scan}
    try:
        found["published, mamba-ssm's scan"] = scan_of_mamba_ssm()
    except ModuleNotFoundError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=tuple(HALF), default='cuda')
    parser.add_argument('--shrink', type=int, default=1, metavar='N',
                        help='divide batch, sides and channels by N, to try the tool out')
    args = parser.parse_args()
    if args.shrink < 1:
        sys.exit(f'error: --shrink must be at least 1, got {args.shrink}')
    on_gpu = args.device == 'cuda'
    if on_gpu and not torch.cuda.is_available():
        sys.exit('error: torch finds no GPU; --device cpu --shrink 8 tries the tool out')
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    setting = make_setting(args.shrink)
    print(f'{torch.cuda.get_device_name() if on_gpu else cpu_name()}, torch {torch.__version__}, '
          f'{str(HALF[args.device]).removeprefix("torch.")} autocast\nVM-UNet of '
          f'{setting.arch.get("embed_dims", 96)} channels, batch {setting.batch}, {setting.side}x'
          f'{setting.side}', flush=True)
    if not is_right(setting, args.device):
        sys.exit('A result is wrong; nothing is timed.')
    ours = None
    for name, scan in ways().items():
        gc.collect()  # or what the way before had would count in the peak
        if on_gpu:
            torch.cuda.empty_cache()
        ms, peak = measure(make(setting, args.device, scan), setting, args.device)
        ours = ours or (ms, peak)
        print(f'  {name:32}step {ms:8.2f} ms, peak {peak:5.2f} GiB; the time of ours times '
              f'{ms / ours[0]:.2f}, its memory times {peak / ours[1]:.2f}', flush=True)


if __name__ == '__main__':
    main()
