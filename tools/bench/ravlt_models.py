"""RAVLT's classifiers for benchmarks, and the same in plain PyTorch as the public code works.

There (github.com/qhfan/RALA) maps have the channels first, also between linear layers, which are
1x1 convolutions; the table of rotations is made for every stage and image; keys are multiplied by
their weights and the number of tokens, and keys and values divided by its square root; scores of
softmax attention are matrices in memory. Norms, sums, gates and activations are ops of their own.
"""

import torch
import torch.nn.functional as F
from published import PublishedForm, Twins, layer_norm
from torch import Tensor, nn
from vssd_models import run_unit

from vmamba_mm.layers.map_blocks import RotaryStage, ScaledBlock
from vmamba_mm.models import RAVLT
from vmamba_mm.models.ravlt import GatedAttention


class PublishedRAVLT(PublishedForm):
    """RAVLT step by step."""

    def forward(self, x: Tensor) -> Tensor:
        backbone = self.classifier.backbone
        for unit in backbone.patch_embed.children():
            x = run_unit(unit, x)
        for stage in backbone.stages:
            places = _places(stage, x)
            for block in stage.blocks:
                x = _block(block, x, *places)
            if stage.downsample is not None:
                x = run_unit(stage.downsample, x)
        projection = backbone.norm3
        x = projection.norm(_linear(projection.proj, x))
        x = F.adaptive_avg_pool2d(x * torch.sigmoid(x), 1).flatten(1)
        return self.classifier.head.fc(x)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, linear.weight[..., None, None], linear.bias)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(norm, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _places(stage: RotaryStage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines (L, P) of the heads of a map (B, C, H, W)."""
    height, width = x.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rates = 1 / 10000 ** torch.linspace(0, 1, stage.dim // 4, dtype=dtype, device=x.device)
    rates = rates.repeat_interleave(2)
    rows, columns = (torch.arange(n, device=x.device)[:, None] * rates for n in (height, width))
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)), -1)
    angles = angles.flatten(0, 1)
    return angles.sin(), angles.cos()


def _block(block: ScaledBlock, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    x = x + block.pos(x)
    x = x + _scaled(_attend(block.attn, _norm(block.norm1, x), sin, cos), block.gamma_1)
    mlp = block.mlp
    y = F.gelu(_linear(mlp.fc1, _norm(block.norm2, x)))
    return x + _scaled(_linear(mlp.fc2, y + mlp.dwconv(y)), block.gamma_2)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma.view(1, -1, 1, 1) * branch


def _attend(attn: GatedAttention, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    qkv, gate = _linear(attn.qkvo, x).split((3 * x.shape[1], x.shape[1]), dim=1)
    beside = attn.lepe(qkv[:, 2 * x.shape[1]:])
    q, k, v = qkv.flatten(2).unflatten(1, (3, attn.num_heads, -1)).transpose(3, 4).unbind(1)
    scale, length = q.shape[-1] ** -0.5, q.shape[-2]                       # (B, heads, L, P)
    if attn.kind == 'softmax':
        q, k = _turn(q, sin, cos), _turn(k, sin, cos)
        y = torch.softmax(scale * q @ k.transpose(-1, -2), -1) @ v
    else:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mean = q.mean(dim=-2, keepdim=True)
        weights = torch.softmax(scale * mean @ k.transpose(-1, -2), dim=-1).transpose(-1, -2)
        k = k * weights * length
        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        q, k, share = _turn(q, sin, cos), _turn(k, sin, cos), length ** -0.5
        y = q @ ((k.transpose(-2, -1) * share) @ (v * share).to(k.dtype)) * z
    y = y.transpose(2, 3).reshape(x.shape)
    return _linear(attn.proj, ((y + beside) * gate).to(gate.dtype))


def _turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    quarter = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos + quarter * sin).to(x.dtype)


#: RAVLT's models.
RAVLTS = Twins('ravlt', ('tiny', 'small', 'base', 'large'),
               lambda arch, height, width: RAVLT(arch), PublishedRAVLT)
