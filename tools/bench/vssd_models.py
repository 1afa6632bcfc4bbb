"""VSSD's classifiers for benchmarks, and the same in plain PyTorch as the public code works.

There (github.com/YuHengsss/VSSD) blocks take tokens (B, L, C), which become maps with the channels
first for every convolution and tokens again after it, x, B and C of the mixer included; the state
is a product for each head, whose B and C are broadcast; norms, sums and the gate are ops of their
own.
"""

import torch.nn.functional as F
from published import PublishedForm, Twins, layer_norm
from torch import Tensor, nn

from vmamba_mm.layers.map_blocks import CPEBlock
from vmamba_mm.layers.maps import ConvUnit
from vmamba_mm.models import VSSD
from vmamba_mm.models.vssd import NonCausalSSD


class PublishedVSSD(PublishedForm):
    """VSSD step by step."""

    def forward(self, x: Tensor) -> Tensor:
        backbone, stem = self.classifier.backbone, self.classifier.backbone.patch_embed
        x = run_unit(stem.conv1, x)
        x = x + run_units(stem.conv2, x)
        x = run_units(stem.conv3, x)
        for stage in backbone.stages:
            size, x = x.shape[2:], x.flatten(2).transpose(1, 2)
            for block in stage.blocks:
                x = _block(block, x, size)
            x = as_map(x, size)
            if stage.downsample is not None:
                x = run_units(stage.downsample.conv, x)
        x = layer_norm(backbone.norm3, x.flatten(2).transpose(1, 2))
        return self.classifier.head.fc(x.transpose(1, 2).mean(2))


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, L, C) to (B, C, H, W), contiguous."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def run_unit(unit: ConvUnit, x: Tensor) -> Tensor:
    x = unit.conv(x)
    x = x if unit.norm is None else unit.norm(x)
    return x if unit.act is None else unit.act(x)


def run_units(units: nn.Sequential, x: Tensor) -> Tensor:
    for unit in units:
        x = run_unit(unit, x)
    return x


def _block(block: CPEBlock, x: Tensor, size: tuple[int, int]) -> Tensor:
    x = x + block.cpe1(as_map(x, size)).flatten(2).transpose(1, 2)
    y = layer_norm(block.norm1, x)
    x = x + (_mix(block.attn, y, size) if isinstance(block.attn, NonCausalSSD)
             else _attend(block.attn, y))
    x = x + block.cpe2(as_map(x, size)).flatten(2).transpose(1, 2)
    mlp = block.mlp
    return x + mlp.fc2(F.gelu(mlp.fc1(layer_norm(block.norm2, x))))


def _mix(mixer: NonCausalSSD, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    inner, state, _ = mixer.sizes
    z, xBC, dt = mixer.in_proj(tokens).split((inner, inner + 2 * state, mixer.num_heads), dim=-1)
    xBC = F.silu(mixer.conv2d(as_map(xBC, size))).flatten(2).transpose(1, 2).contiguous()
    x, B, C = xBC.split((inner, state, state), dim=-1)
    weights = F.softplus(dt + mixer.dt_bias) * mixer.A_log.float().exp()
    values = x.unflatten(2, (mixer.num_heads, -1)).transpose(1, 2)         # (B, heads, L, P)
    weighted = (values * weights.transpose(1, 2).unsqueeze(-1)).to(x.dtype)  # as autocast does
    y = C.unsqueeze(1) @ (B.unsqueeze(1).transpose(2, 3) @ weighted)
    y = (y + values * mixer.D.view(-1, 1, 1)).transpose(1, 2).flatten(2)
    return mixer.out_proj(layer_norm(mixer.norm, y) * z)


def _attend(attention: nn.Module, tokens: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
               for t in attention.qkv(tokens).chunk(3, dim=-1))
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return attention.proj((scores @ v).transpose(1, 2).flatten(2))


#: VSSD's models.
VSSDS = Twins('vssd', ('micro', 'tiny', 'small', 'base'), lambda arch, height, width: VSSD(arch),
              PublishedVSSD)
