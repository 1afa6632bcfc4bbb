"""MILA's classifiers for benchmarks, and the same in plain PyTorch as the public code works.

There (github.com/LeapLabTHU/MLLA) blocks take tokens (B, L, C), which become maps with the channels
first for every convolution and tokens again after it; queries and keys are turned as complex
numbers in fp32, by a table that each block has for its size of maps; the products of attention, the
denominators, norms, sums and activations are ops of their own.
"""

import torch
import torch.nn.functional as F
from published import PublishedForm, Twins, layer_norm
from torch import Tensor
from vssd_models import as_map, run_unit, run_units

from vmamba_mm.layers.map_blocks import CPEBlock
from vmamba_mm.models import MILA
from vmamba_mm.models.mila import MILAMixer
from vmamba_mm.ops.rotation import map_rotation_table


class PublishedMILA(PublishedForm):
    """MILA step by step, for images whose sides are multiples of 32."""

    def __init__(self, classifier):
        super().__init__(classifier)
        self.tables: dict[tuple, Tensor] = {}  # of each size of maps: there they are buffers

    def forward(self, x: Tensor) -> Tensor:
        backbone, stem = self.classifier.backbone, self.classifier.backbone.patch_embed
        x = run_unit(stem.conv1, x)
        x = x + run_units(stem.conv2, x)
        x = run_units(stem.conv3, x)
        for stage in backbone.stages:
            size, table = x.shape[2:], self._table(x)
            x = x.flatten(2).transpose(1, 2)
            for block in stage.blocks:
                x = _block(block, x, size, table)
            x = as_map(x, size)
            if stage.downsample is not None:
                x = run_units(stage.downsample.conv, x)
        x = layer_norm(backbone.norm3, x.flatten(2).transpose(1, 2))
        return self.classifier.head.fc(x.transpose(1, 2).mean(2))

    def _table(self, x: Tensor) -> Tensor:
        """(L, C / 2), complex."""
        key = *x.shape[1:], x.device, x.dtype == torch.float64
        if key not in self.tables:
            table = map_rotation_table(*x.shape[2:], x.shape[1], endpoint=False, dtype=x.dtype,
                                       device=x.device)
            self.tables[key] = torch.view_as_complex(table.flatten(0, 1).contiguous())
        return self.tables[key]


def _block(block: CPEBlock, x: Tensor, size: tuple[int, int], table: Tensor) -> Tensor:
    x = x + block.cpe1(as_map(x, size)).flatten(2).transpose(1, 2)
    x = x + _mix(block.attn, layer_norm(block.norm1, x), size, table)
    x = x + block.cpe2(as_map(x, size)).flatten(2).transpose(1, 2)
    mlp = block.mlp
    return x + mlp.fc2(F.gelu(mlp.fc1(layer_norm(block.norm2, x))))


def _mix(mixer: MILAMixer, tokens: Tensor, size: tuple[int, int], table: Tensor) -> Tensor:
    gate = F.silu(mixer.act_proj(tokens))
    x = F.silu(mixer.conv2d(as_map(mixer.in_proj(tokens), size))).flatten(2).transpose(1, 2)
    q, k = (F.elu(t) + 1.0 for t in mixer.qk(x).chunk(2, dim=-1))
    turned_q, turned_k = (_turn(t, table) for t in (q, k))
    q, k, turned_q, turned_k, v = (
        t.unflatten(2, (mixer.num_heads, -1)).transpose(1, 2)
        for t in (q, k, turned_q, turned_k, x))                            # (B, heads, L, P)
    share = x.shape[1] ** -0.5
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    state = (turned_k.transpose(-2, -1) * share) @ (v * share).to(turned_k.dtype)
    y = (turned_q @ state * z).transpose(1, 2).reshape(x.shape)
    y = y + mixer.lepe(as_map(x, size)).flatten(2).transpose(1, 2)
    return mixer.out_proj((y * gate).to(gate.dtype))


def _turn(x: Tensor, table: Tensor) -> Tensor:
    pairs = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


#: MILA's models.
MILAS = Twins('mila', ('tiny', 'small', 'base'), lambda arch, height, width: MILA(arch),
              PublishedMILA)
