"""RMT's classifiers for benchmarks, and the same in plain PyTorch as the public code works.

There (github.com/qhfan/RMT) queries and keys are turned in maps with the heads first, the scores of
attention are matrices in memory, to which the masks are added, which each stage makes anew; softmax
and the sum over the values are ops of their own. So are norms, sums and GELU. Convolutions take
maps with the channels first, which the public code gets by permuting those that have them last.
"""

import torch
import torch.nn.functional as F
from published import PublishedForm, Twins, layer_norm
from torch import Tensor, nn

from vmamba_mm.layers.maps import ConvUnit
from vmamba_mm.models import RMT
from vmamba_mm.models.rmt import ManhattanAttention, RMTBlock, RMTStage


class PublishedRMT(PublishedForm):
    """RMT step by step."""

    def forward(self, x: Tensor) -> Tensor:
        backbone = self.classifier.backbone
        for unit in backbone.patch_embed.children():
            x = _unit(unit, x)
        x = x.permute(0, 2, 3, 1)
        for stage in backbone.stages:
            places = _places(stage, x)
            for block in stage.blocks:
                x = _block(block, x, places)
            if stage.downsample is not None:
                x = _unit(stage.downsample, x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        projection = backbone.norm3
        x = projection.norm(projection.proj(x).permute(0, 3, 1, 2)).flatten(2)
        x = F.adaptive_avg_pool1d(x * torch.sigmoid(x), 1).flatten(1)
        return self.classifier.head.fc(x)


def _unit(unit: ConvUnit, x: Tensor) -> Tensor:
    x = unit.norm(unit.conv(x))
    return x if unit.act is None else unit.act(x)


def _places(stage: RMTStage, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Sines and cosines (H, W, P) for a map (B, H, W, C), and the masks of the stage's form."""
    height, width, decay = *x.shape[1:3], stage.decay
    rates = 1 / 10000 ** torch.linspace(0, 1, stage.head_dim // 2, dtype=decay.dtype,
                                        device=decay.device)
    numbers = torch.arange(height * width).to(decay)
    angles = numbers[:, None] * rates.repeat_interleave(2)
    sin, cos = (t.view(height, width, -1) for t in (angles.sin(), angles.cos()))
    rows, columns = (torch.arange(size).to(decay) for size in (height, width))
    if stage.form == 'decomposed':
        masks = [(side[:, None] - side).abs() * decay[:, None, None] for side in (rows, columns)]
        return sin, cos, tuple(masks)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing='ij'), dim=-1).flatten(0, 1)
    distances = (grid[:, None] - grid).abs().sum(-1)
    return sin, cos, (distances * decay[:, None, None],)


def _block(block: RMTBlock, x: Tensor, places: tuple) -> Tensor:
    x = x + _convolve(block.pos, x)
    x = x + _scaled(_attend(block.attn, layer_norm(block.norm1, x), *places), block.gamma_1)
    mlp = block.mlp
    y = F.gelu(mlp.fc1(layer_norm(block.norm2, x)))
    return x + _scaled(mlp.fc2(_convolve(mlp.dwconv, y) + y), block.gamma_2)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _attend(attn: ManhattanAttention, x: Tensor, sin: Tensor, cos: Tensor,
            masks: tuple[Tensor, ...]) -> Tensor:
    size, heads = x.shape[:3], attn.num_heads
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    beside = _convolve(attn.lepe, v)
    k *= (k.shape[-1] // heads) ** -0.5
    q, k = (_turn(t.view(*size, heads, -1).permute(0, 3, 1, 2, 4), sin, cos)
            for t in (q, k))                                               # (B, n, H, W, P)
    v = v.view(*size, heads, -1)                                           # (B, H, W, n, P)
    if attn.form == 'decomposed':
        of_columns, of_rows = masks
        y = _weigh(q.transpose(1, 2), k.transpose(1, 2), v.transpose(2, 3), of_rows)
        y = _weigh(q.permute(0, 3, 1, 2, 4), k.permute(0, 3, 1, 2, 4), y.permute(0, 3, 2, 1, 4),
                   of_columns)                                             # (B, W, n, H, P)
        y = y.permute(0, 3, 1, 2, 4).flatten(3)
    else:
        q, k, v = (t.flatten(2, 3) for t in (q, k, v.permute(0, 3, 1, 2, 4)))
        y = _weigh(q, k, v, masks[0]).transpose(1, 2).reshape(*size, -1)
    return attn.out_proj(y + beside)


def _turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    quarter = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + quarter * sin


def _weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + mask, -1) @ v


#: RMT's models.
RMTS = Twins('rmt', ('tiny', 'small', 'base', 'large'), lambda arch, height, width: RMT(arch),
             PublishedRMT)
