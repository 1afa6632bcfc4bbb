"""SegMamba at its published patch on a GPU: a step of training, and how much of it its mixers take.

128x128x128 voxels, batch 2, fp16 autocast. Beside the network stands the same with the published
mixer: every order copied in memory with the channels first, and run by itself with the steps that
tools/bench/vim_models.py describes, by mamba-ssm's scan where it is installed, and by this
package's. "mixers" are those of a step alone, forward and backward, on random maps of their sizes,
replayed as a CUDA graph: in a step the convolutions give Python the time to be ahead.

Each stage's mixer is compared first, map and gradients, with the published one. What is wrong is
not timed, and ends with 1.
"""

import argparse
import copy
import gc
import sys

import torch
import torch.nn.functional as F
from ss2d_gpu import graphed
from torch import Tensor, nn
from vim_models import published_direction, scan_of_mamba_ssm

from vmamba_mm.heads import SegMamba
from vmamba_mm.layers import TriMambaMixer
from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import relative_error

SIDE, BATCH = 128, 2
MAX_ERROR = 2e-2  # of fp16 beside fp16, over 262,144 steps


class PublishedMixer(TriMambaMixer):
    """:class:`TriMambaMixer`, of which it has the parameters, order by order."""

    scan = staticmethod(selective_scan)

    def forward(self, x: Tensor, num_slices: int) -> Tensor:
        batch, length, _ = x.shape
        xz = (self.in_proj.weight @ x.flatten(0, 1).T).view(-1, batch, length).transpose(0, 1)
        y = published_direction(self, xz) + published_direction(self, xz.flip(-1), '_b').flip(-1)
        across = xz.unflatten(-1, (num_slices, -1)).transpose(-1, -2).flatten(-2)
        across = published_direction(self, across, '_s').unflatten(-1, (-1, num_slices))
        return self.out_proj((y + across.transpose(-1, -2).flatten(-2)).transpose(1, 2))


def publish(model: nn.Module, scan=selective_scan) -> nn.Module:
    """The model with :class:`PublishedMixer` for each mixer, with the same parameters."""
    for parent in list(model.modules()):
        for name, mixer in list(parent.named_children()):
            if type(mixer) is TriMambaMixer:
                published = PublishedMixer(mixer.in_proj.in_features, d_state=mixer.d_state)
                published.load_state_dict(mixer.state_dict())
                published.scan = scan
                setattr(parent, name, published.to(mixer.D))
    return model


def make(scan=None) -> SegMamba:
    """Ours, or the published form by a scan."""
    torch.manual_seed(0)
    net = SegMamba().cuda()
    return net if scan is None else publish(net, scan)


def sizes(net: SegMamba) -> list[tuple[nn.Module, int]]:
    """Every block and the tokens that its mixer receives."""
    backbone = net.backbone
    return [(block, (SIDE // stride) ** 3) for stage, stride in
            zip(backbone.stages, backbone.stage_strides(backbone.arch), strict=True)
            for block in stage.blocks]


def make_map(mixer: nn.Module, tokens: int) -> Tensor:
    x = torch.randn(BATCH, tokens, mixer.in_proj.in_features, device='cuda')
    return x.half().requires_grad_()


def run(mixer: nn.Module, x: Tensor, grad: Tensor, num_slices: int) -> list[Tensor]:
    """The result and the gradients of a step under autocast."""
    with torch.autocast('cuda', torch.float16):
        y = mixer(x, num_slices)
    return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], grad.to(y.dtype))]


def is_right(stage: nn.Module, tokens: int) -> bool:
    block = stage.blocks[0]
    x = make_map(block.mixer, tokens)
    grad = torch.randn_like(x)
    published = publish(nn.ModuleList([copy.deepcopy(block.mixer)]))[0]
    error = max(relative_error(a, b) for a, b in zip(
        run(block.mixer, x, grad, block.num_slices), run(published, x, grad, block.num_slices),
        strict=True))
    print(f'  {tokens} tokens of {x.shape[2]} channels: largest error {error:.1e}', flush=True)
    return error <= MAX_ERROR


def time_mixers(net: SegMamba) -> float:
    """ms of all mixers, forward and backward."""
    maps = [(block, make_map(block.mixer, tokens)) for block, tokens in sizes(net)]
    grads = [torch.randn_like(x) for _, x in maps]

    def step():
        for (block, x), grad in zip(maps, grads, strict=True):
            run(block.mixer, x, grad, block.num_slices)

    ms = median_ms(graphed(step))
    gc.collect()  # or the graph's memory would count in the peak
    torch.cuda.empty_cache()
    return ms


def time_whole(net: SegMamba) -> tuple[float, int]:
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


def ways() -> dict[str, object]:
    """{what: its scan}, None for ours, which comes first."""
    found = {'this package': None}
    try:
        found["published, mamba-ssm's scan"] = scan_of_mamba_ssm()
    except ModuleNotFoundError:
        pass
    return {**found, "published, this package's scan": selective_scan}


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit('SegMamba is timed on a GPU, and torch finds none')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16 autocast')
    torch.backends.cudnn.benchmark = True
    backbone = make().backbone
    if not all([is_right(stage, (SIDE // stride) ** 3) for stage, stride in
                zip(backbone.stages, backbone.stage_strides(backbone.arch), strict=True)]):
        sys.exit('wrong: not timed')
    del backbone
    ours = None
    for name, scan in ways().items():
        network = None
        gc.collect()  # or what the way before had would count in the peak
        torch.cuda.empty_cache()
        network = make(scan)
        mixers = time_mixers(network)
        step, peak = time_whole(network)
        ours = ours or mixers
        print(f'  {name:32}step {step:8.2f} ms, peak {peak / 2**30:5.2f} GiB, mixers '
              f'{mixers:7.2f} ms, {mixers / step:.1%}; those of ours take {ours / mixers:.2f} '
              'times as long', flush=True)


if __name__ == '__main__':
    main()
