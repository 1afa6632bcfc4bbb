"""PointMamba on a GPU: a step of training at batch 32 on 1024 points, beside its published form.

fp16 autocast, 64 groups of 32, 12 blocks, drop path as in the recipe of ModelNet40. The published
form has the mixer step by step (tools/bench/vim_models.py describes its steps), by mamba-ssm's scan
where it is installed, and by this package's; a residual sum and a norm by themselves; and the
convolutions of its group embedding, with the group's maximum repeated for each point. Both have
this package's grouping and orders, whose time is shown too: the published extensions are not built
here.

Results and gradients are compared first: their errors beside the published form in fp32 may be
twice those of that form under autocast. What is wrong is not timed, and ends with 1.
"""

import argparse
import copy
import gc
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vim_models import published_direction, scan_of_mamba_ssm

from vmamba_mm.heads import PointClassifier, PointHead
from vmamba_mm.layers import MambaMixer
from vmamba_mm.mm.measuring import held_and_peak, median_ms
from vmamba_mm.models import PointMamba
from vmamba_mm.models.pointmamba import GroupEmbed
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import relative_error

BATCH, POINTS = 32, 1024
FLOOR = 2e-3  # an error of fp16 that is always allowed
SCALE = 1024  # of the loss, or gradients are below the range of fp16
TARGET = 1.5


class PublishedMixer(MambaMixer):
    """:class:`MambaMixer`, of which it has the parameters, step by step."""

    scan = staticmethod(selective_scan)

    def forward(self, x: Tensor, state: None = None) -> Tensor:
        batch, length, _ = x.shape
        xz = (self.in_proj.weight @ x.flatten(0, 1).T).view(-1, batch, length).transpose(0, 1)
        return self.out_proj(published_direction(self, xz).transpose(1, 2))


class PublishedBlock(nn.Module):
    """x + drop_path(mixer(norm(x))), in the place of a MambaBlock."""

    def __init__(self, block: nn.Module, scan):
        super().__init__()
        given = block.mixer
        self.mixer = PublishedMixer(given.in_proj.in_features, d_state=given.d_state)
        self.mixer.load_state_dict(given.state_dict())
        self.mixer.scan = scan
        self.norm = nn.LayerNorm(given.in_proj.in_features)
        self.norm.load_state_dict(block.norm.state_dict())
        self.drop_path = block.drop_path

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if residual is None else residual + x
        return self.drop_path(self.mixer(self.norm(x))), x


class PublishedEmbed(GroupEmbed):
    """:class:`GroupEmbed` by convolutions, each point with the group's maximum beside it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, size, _ = x.shape
        x = x.flatten(0, 1).transpose(2, 1)
        x = self.conv2(F.relu(self.norm1(self.conv1(x))))
        whole = x.max(2, keepdim=True).values.expand(-1, -1, size)
        x = self.conv4(F.relu(self.norm2(self.conv3(torch.cat([whole, x], 1)))))
        return x.max(2).values.view(batch, count, -1)


def publish(model: PointClassifier, scan=selective_scan) -> PointClassifier:
    """A copy of the model in its published form, with the same parameters."""
    model = copy.deepcopy(model)
    backbone, weight = model.backbone, next(model.parameters())
    backbone.blocks = nn.ModuleList(PublishedBlock(block, scan) for block in backbone.blocks)
    embed = PublishedEmbed(backbone.patch_embed.conv1.in_channels, backbone.num_features[-1])
    embed.load_state_dict(backbone.patch_embed.state_dict())
    backbone.patch_embed = embed
    return model.to(weight).train(model.training)


def make(arch='hilbert_g64', drop_path_rate: float = 0.1) -> PointClassifier:
    torch.manual_seed(0)
    backbone = PointMamba(arch, out_type='raw', drop_path_rate=drop_path_rate)
    for block in backbone.blocks:  # whose mixers give next to nothing at first
        block.mixer.in_proj.reset_parameters()
        block.mixer.out_proj.reset_parameters()
        nn.init.uniform_(block.mixer.x_proj.weight, -0.3, 0.3)
    return PointClassifier(backbone, PointHead(backbone.num_features[-1], 40))


def make_clouds(batch: int = BATCH, count: int = POINTS, device: str = 'cuda') -> Tensor:
    points = torch.randn(batch, count, 3, device=device)
    return points / points.norm(dim=2).amax(1).view(-1, 1, 1)


def results_of(model: nn.Module, points: Tensor, half: bool) -> list[Tensor]:
    """The features and the gradients of the backbone's parameters, under autocast or in fp32."""
    torch.manual_seed(1)
    with torch.autocast(points.device.type, torch.float16, enabled=half):
        tokens, = model.backbone(points)
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    (SCALE * tokens.float() * upstream.to(points)).mean().backward()
    gradients = [p.grad for p in model.backbone.parameters()]
    model.zero_grad(set_to_none=True)
    return [tokens, torch.cat([g.flatten().float() for g in gradients])]


def is_right(scan=selective_scan, model: PointClassifier | None = None,
             points: Tensor | None = None) -> bool:
    model = make().cuda() if model is None else model
    points = make_clouds(4) if points is None else points
    published = publish(model, scan)
    exact = results_of(published, points, half=False)
    found, others = (results_of(of, points, points.is_cuda) for of in (model, published))
    right = True
    for name, *results in zip(('features', 'gradients'), found, others, exact, strict=True):
        error, other = (relative_error(result, results[2]) for result in results[:2])
        limit = max(FLOOR, 2 * other)
        print(f'  {name}: error {error:.1e}, at most {limit:.1e}', flush=True)
        right &= error <= limit
    return right


def time_step(model: nn.Module, points: Tensor) -> tuple[float, int]:
    """ms of a training step, its peak memory in bytes."""
    labels = torch.randint(40, (len(points),), device=points.device)
    scaler = torch.amp.GradScaler('cuda')

    def step():
        with torch.autocast('cuda', torch.float16):
            loss = F.cross_entropy(model(points), labels)
        scaler.scale(loss).backward()
        model.zero_grad(set_to_none=True)

    step()
    _, peak = held_and_peak(step, on_gpu=True)
    return median_ms(step), peak


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit('PointMamba is timed on a GPU, and torch finds none')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16 autocast')
    if not is_right():
        sys.exit('wrong: not timed')
    points, backbone = make_clouds(), make().cuda().backbone
    with torch.no_grad():
        grouping = median_ms(lambda: backbone.group(points))
        centres = backbone.group(points).centres
        orders = median_ms(lambda: backbone.orders(centres))
    print(f'  of both: groups {grouping:.2f} ms, orders {orders:.2f} ms')
    ways = {'this package': None}
    try:
        ways["published, mamba-ssm's scan"] = scan_of_mamba_ssm()
    except ModuleNotFoundError:
        pass
    ours = None
    for name, scan in {**ways, "published, this package's scan": selective_scan}.items():
        model = None
        gc.collect()  # or what the way before had would count in the peak
        torch.cuda.empty_cache()
        model = make().cuda().train()
        model = model if scan is None else publish(model, scan)
        step, peak = time_step(model, points)
        ours = ours or step
        print(f'  {name:32}step {step:7.2f} ms, peak {peak / 2**30:5.2f} GiB, '
              f'{step / ours:.2f} times ours (target {TARGET:g})', flush=True)


if __name__ == '__main__':
    main()
