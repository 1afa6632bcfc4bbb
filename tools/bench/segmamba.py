"""SegMamba at its published patch on a GPU: correctness, its mixers' share of a training step.

128x128x128 voxels, batch 2, fp16 autocast. Each stage's mixer is first compared, map and gradients,
with the same weights run as the public code runs them: every order copied in memory, a convolution,
two projections and a scan of its own, with this package's kernel for the scan. What is wrong is not
timed, and ends with 1. Then both ways are timed, and a training step of the whole network.
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from vmamba_mm.heads import SegMamba
from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.ops import across_slices, along_slices, selective_scan
from vmamba_mm.testing import relative_error

SIDE, BATCH = 128, 2
MAX_ERROR = 2e-2  # of fp16 beside fp16, over 262,144 steps

ORDERS = {'': (lambda x, n: x, lambda x, n: x), '_b': (lambda x, n: x.flip(1),) * 2,
          '_s': (across_slices, along_slices)}


def order_by_order(mixer, x, num_slices):
    """The mixer as the public code runs it, (B, L, C) to (B, L, C)."""
    xz, total = mixer.in_proj(x), 0
    for suffix, (there, back) in ORDERS.items():
        u, z = there(xz, num_slices).transpose(1, 2).contiguous().chunk(2, dim=1)
        conv, x_proj, dt_proj = (getattr(mixer, f'{name}{suffix}')
                                 for name in ('conv1d', 'x_proj', 'dt_proj'))
        u = F.silu(conv(u)[..., :u.shape[2]])
        dt, B, C = x_proj(u.transpose(1, 2)).split(
            (mixer.dt_rank, mixer.d_state, mixer.d_state), dim=-1)
        delta = F.linear(dt, dt_proj.weight).transpose(1, 2)
        y = selective_scan(
            u, delta, -getattr(mixer, f'A{suffix}_log').exp(), B.transpose(1, 2)[:, None],
            C.transpose(1, 2)[:, None], getattr(mixer, f'D{suffix}'), z=z,
            delta_bias=dt_proj.bias, delta_softplus=True)
        total = total + back(y.transpose(1, 2), num_slices)
    return mixer.out_proj(total)


def run(function, mixer, x, grad, num_slices):
    """The result and the gradients of a step under autocast."""
    leaves = [x, *mixer.parameters()]
    with torch.autocast('cuda', torch.float16):
        y = function(x, num_slices) if function is mixer else function(mixer, x, num_slices)
    return y, torch.autograd.grad(y, leaves, grad.to(y.dtype))


def check_and_time(stage, tokens, blocks):
    """(ms ours, ms order by order) of forward and backward of a stage's mixers; None if wrong."""
    block = stage.blocks[0]
    mixer, n = block.mixer, block.num_slices
    x = torch.randn(BATCH, tokens, mixer.in_proj.in_features, device='cuda').half()
    x, grad = x.requires_grad_(), torch.randn_like(x)
    found, others = (run(f, mixer, x, grad, n) for f in (mixer, order_by_order))
    errors = [relative_error(a, b) for a, b in zip((found[0], *found[1]), (others[0], *others[1]),
                                                   strict=True)]
    print(f'  {tokens} tokens of {x.shape[2]} channels: largest error {max(errors):.1e}')
    if not max(errors) <= MAX_ERROR:
        return None
    return tuple(blocks * median_ms(lambda f=f: run(f, mixer, x, grad, n))
                 for f in (mixer, order_by_order))


def time_whole(net):
    """ms of a training step, its peak memory in bytes."""
    volume = torch.randn(BATCH, 4, SIDE, SIDE, SIDE, device='cuda')
    labels = torch.randint(4, (BATCH, SIDE, SIDE, SIDE), device='cuda')
    scaler = torch.amp.GradScaler('cuda')

    def step():
        with torch.autocast('cuda', torch.float16):
            loss = F.cross_entropy(net(volume), labels)
        scaler.scale(loss).backward()
        net.zero_grad(set_to_none=True)

    step()
    _, peak = held_and_peak(step, on_gpu=True)
    return median_ms(step), peak


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit('SegMamba is timed on a GPU, and torch finds none')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}')
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    net = SegMamba().cuda()
    times = [check_and_time(stage, (SIDE // stride) ** 3, len(stage.blocks)) for stage, stride in
             zip(net.backbone.stages, net.backbone.stage_strides(net.backbone.arch), strict=True)]
    if None in times:
        sys.exit('wrong: not timed')
    ours, theirs = (sum(column) for column in zip(*times, strict=True))
    for i, (a, b) in enumerate(times):
        print(f'  stage {i}: mixers {a:.2f} ms, order by order {b:.2f} ms ({a / b:.2f}x)')
    step, peak = time_whole(net)
    print(f'  mixers of a step: {ours:.1f} ms, order by order {theirs:.1f} ms '
          f'({ours / theirs:.2f}x); the step: {step:.1f} ms, of which {ours / step:.0%} are '
          f'mixers, peak memory {peak / 2 ** 30:.1f} GiB')


if __name__ == '__main__':
    main()
