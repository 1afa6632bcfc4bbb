"""The backbone of the made-up family, as a user's package or a new file of ours would have it."""

import math

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from made_up.family import FAMILY
from torch import nn

from vmamba_mm.layers import DropPath, LayerNorm2d
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.ops import selective_scan
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('selective_scan')
torch.fx.wrap('_resize')


class Mixer(nn.Module):
    def __init__(self, dim, d_state):
        super().__init__()
        self.x_proj = nn.Linear(dim, dim + 2 * d_state, bias=False)
        self.dt_bias = nn.Parameter(torch.full((dim,), -2.0))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        dim, d_state = self.A_log.shape
        dt, b, c = self.x_proj(x).transpose(1, 2).split([dim, d_state, d_state], 1)
        y = selective_scan(x.transpose(1, 2), dt, -self.A_log.float().exp(), b[:, None], c[:, None],
                           self.D, delta_bias=self.dt_bias, delta_softplus=True)
        return self.out_proj(y.transpose(1, 2).to(x.dtype))


class Block(nn.Module):
    def __init__(self, dim, d_state, drop_path, with_cp):
        super().__init__()
        self.with_cp = with_cp
        self.norm = nn.LayerNorm(dim)
        self.mixer = Mixer(dim, d_state)
        self.drop_path = DropPath(drop_path)

    def _forward(self, x):
        return x + self.drop_path(self.mixer(self.norm(x)))

    def forward(self, x):
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


@MODELS.register_module()
class Ripple(Backbone):
    family = FAMILY
    default_arch = 'nano'
    stem = ('patch_embed', 'pos_embed')
    stages_name = 'blocks'
    is_flat = True

    @staticmethod
    def stage_sizes(arch):
        return (1,) * arch['depth'], [arch['embed_dims']] * arch['depth']

    def build(self, in_channels, drop_path_rates, with_cp):
        dim, patch, d_state = (self.arch[k] for k in ('embed_dims', 'patch_size', 'd_state'))
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (self.arch['image_size'] // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, d_state, rate, with_cp) for rate in drop_path_rates)
        self.norm = LayerNorm2d(dim)
        self.apply(init_linear)

    def output_norm(self, i):
        return self.norm if i == len(self.depths) - 1 else None

    def adapt_weights(self, weights):
        pos_embed = weights.get('pos_embed')
        if pos_embed is None or pos_embed.shape[1] == self.pos_embed.shape[1]:
            return weights
        size = math.isqrt(self.pos_embed.shape[1])
        resized = _resize(pos_embed, size, size).flatten(1, 2)
        return weights | {'pos_embed': resized}

    def forward_stages(self, x, indices):
        patch = self.arch['patch_size']
        _, _, height, width = x.shape
        x = F.pad(x, (0, (width + patch - 1) // patch * patch - width,
                      0, (height + patch - 1) // patch * patch - height))
        x = self.patch_embed(x)
        batch, dim, height, width = x.shape
        x = x.permute(0, 2, 3, 1) + _resize(self.pos_embed, height, width)
        x, maps = x.reshape(batch, height * width, dim), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in indices:
                maps.append(x.reshape(batch, height, width, dim))
            if i == indices[-1]:
                break
        return maps


def _resize(pos_embed, height, width):
    """(1, L, C) of a square to (1, height, width, C)."""
    side = math.isqrt(pos_embed.shape[1])
    grid = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (height, width), mode='bilinear').permute(0, 2, 3, 1)
