"""Vision-RWKV's classifiers for benchmarks, and the same in plain PyTorch as the public code works.

There (github.com/OpenGVLab/Vision-RWKV) blocks take tokens (B, T, C). The shifts fill a map with
the channels first, each of the mixtures is a sum of two products, and the WKV takes and gives fp32.
Norms, factors, sums and gates are ops of their own. In the place of the public CUDA extension, the
newest of which does not build with torch 2.11, is this package's ``bi_wkv``, by the same formula.
"""

import torch
import torch.nn.functional as F
from published import PublishedForm, Twins, layer_norm
from torch import Tensor

from vmamba_mm.models import VisionRWKV
from vmamba_mm.models.vision_rwkv import ChannelMix, SpatialMix, VisionRWKVBlock
from vmamba_mm.ops import bi_wkv
from vmamba_mm.ops.core.backends import compute_dtype


class PublishedVRWKV(PublishedForm):
    """Vision-RWKV step by step, of images whose sides are multiples of 16."""

    def forward(self, x: Tensor) -> Tensor:
        backbone = self.classifier.backbone
        x = backbone.patch_embed.proj(x)
        size, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        x = x + _resized(backbone.pos_embed, backbone.grid, size)
        for block in backbone.blocks:
            x = _block(block, x, size)
        x = layer_norm(backbone.norm11, x)
        x = x.view(len(x), *size, -1).permute(0, 3, 1, 2)
        return self.classifier.head.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _resized(pos_embed: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    if tuple(size) == tuple(grid):
        return pos_embed
    there = pos_embed.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.interpolate(there, tuple(size), mode='bicubic').flatten(2).transpose(1, 2)


def _block(block: VisionRWKVBlock, x: Tensor, size: tuple[int, int]) -> Tensor:
    if block.ln0 is not None:
        x = layer_norm(block.ln0, x)
    for mix, mixer, norm, gamma in ((_mix_tokens, block.att, block.ln1, block.gamma1),
                                    (_mix_channels, block.ffn, block.ln2, block.gamma2)):
        branch = layer_norm(norm, mix(mixer, x, size)) if block.post_norm else mix(
            mixer, layer_norm(norm, x), size)
        x = x + (branch if gamma is None else gamma * branch)
    return x


def _mix_tokens(mixer: SpatialMix, x: Tensor, size: tuple[int, int]) -> Tensor:
    for_k, for_v, for_r = _mixtures(mixer, x, size)
    k, v = mixer.key(for_k), mixer.value(for_v)
    gate = torch.sigmoid(mixer.receptance(for_r))
    w, u = (t / x.shape[1] for t in (mixer.spatial_decay, mixer.spatial_first))
    wide = (t.to(compute_dtype(t.dtype)).contiguous() for t in (w, u, k, v))
    y = bi_wkv(*wide, mode=mixer.formula).to(w.dtype)
    if mixer.key_norm is not None:
        y = layer_norm(mixer.key_norm, y)
    return mixer.output(gate * y)


def _mix_channels(mixer: ChannelMix, x: Tensor, size: tuple[int, int]) -> Tensor:
    for_k, for_r = _mixtures(mixer, x, size)
    hidden = torch.square(torch.relu(mixer.key(for_k)))
    if mixer.key_norm is not None:
        hidden = layer_norm(mixer.key_norm, hidden)
    values = mixer.value(hidden)
    return torch.sigmoid(mixer.receptance(for_r)) * values


def _mixtures(mixer: SpatialMix | ChannelMix, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    shifted = _shift(x, size)
    shares = (getattr(mixer, f'spatial_mix_{name}') for name in mixer.mixtures)
    return [x * share + shifted * (1 - share) for share in shares]


def _shift(x: Tensor, size: tuple[int, int]) -> Tensor:
    maps = x.transpose(1, 2).reshape(len(x), -1, *size)
    shifted, group = torch.zeros_like(maps), maps.shape[1] // 4
    shifted[:, :group, :, 1:] = maps[:, :group, :, :-1]
    shifted[:, group:2 * group, :, :-1] = maps[:, group:2 * group, :, 1:]
    shifted[:, 2 * group:3 * group, 1:] = maps[:, 2 * group:3 * group, :-1]
    shifted[:, 3 * group:4 * group, :-1] = maps[:, 3 * group:4 * group, 1:]
    shifted[:, 4 * group:] = maps[:, 4 * group:]
    return shifted.flatten(2).transpose(1, 2)


#: Vision-RWKV's models.
VRWKVS = Twins('vision_rwkv', ('tiny', 'small', 'base'), lambda arch, height, width: VisionRWKV(
    dict(base=arch, image_size=(height, width)), out_indices=(2, 5, 8, 11)), PublishedVRWKV)
