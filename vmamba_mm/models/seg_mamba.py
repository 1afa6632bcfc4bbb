"""SegMamba's encoder of volumes (arXiv 2401.13560, section 2)."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.families.seg_mamba import FAMILY
from vmamba_mm.layers import DropPath, LayerNorm, Stage, TriMambaMixer
from vmamba_mm.layers.positions import pad_volume
from vmamba_mm.models.base import Backbone
from vmamba_mm.registry import MODELS

#: The side of what one position of the deepest map stands for.
STRIDE = 16

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('pad_volume')


class VolumeStem(nn.Module):
    """A 7x7x7 convolution of stride 2: (B, C, D, H, W) to half of each side."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, embed_dims, 7, stride=2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VolumeDownsample(nn.Module):
    """Instance norm and a 2x2x2 convolution of stride 2: (B, C, D, H, W) to half of each side."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.instance_norm(x))


class GatedSpatialConv(nn.Module):
    """GSC, as the public code has it: the branches are added, where the paper multiplies them
    (section 2.3).

    Two 3x3x3 convolutions beside one of 1x1x1, and one of 1x1x1 of their sum, each with instance
    norm and ReLU, are added to the input.

    Shape: (B, C, D, H, W) -> the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, channels, 3, padding=1)
        self.proj2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.proj3 = nn.Conv3d(channels, channels, 1)
        self.proj4 = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        main = _norm_relu(self.proj2(_norm_relu(self.proj(x))))
        return x + _norm_relu(self.proj4(main + _norm_relu(self.proj3(x))))


def _norm_relu(x: Tensor) -> Tensor:
    return F.relu(F.instance_norm(x))


class TriMambaBlock(nn.Module):
    """x + drop_path(mixer(norm(x))) on the positions of a map, the last axis the fastest.

    Args:
        mixer: of the tokens.
        dims: C.
        num_slices: of the order across slices; None for the slices of the map.
        drop_path: probability to drop the mixer's result for a sample.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, C, D, H, W) -> the same.
    """

    def __init__(self, mixer: TriMambaMixer, dims: int, num_slices: int | None = None,
                 drop_path: float = 0.0, with_cp: bool = False):
        super().__init__()
        self.norm = LayerNorm(dims, feeds_matmul=True)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.num_slices = num_slices
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        depth, height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.mixer(self.norm(tokens), self.num_slices or depth))
        return tokens.transpose(1, 2).unflatten(2, (depth, height, width))


class SegMambaStage(Stage):
    """A gated spatial convolution, Mamba blocks and the downsampling, on maps (B, C, D, H, W).

    Args:
        gsc: the convolution.
        blocks: :class:`TriMambaBlock`.
        downsample: None in the last stage.
    """

    def __init__(self, gsc: nn.Module, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__(blocks, downsample)
        self.gsc = gsc

    def _run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks(self.gsc(x))


class SkipMlp(nn.Module):
    """What a stage gives the decoder: instance norm and an MLP at each position, C to 2C to C.

    The public code has it in place of the paper's uncertainty estimation (section 2.4).

    Shape: (B, C, D, H, W) -> the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv3d(channels, 2 * channels, 1)
        self.fc2 = nn.Conv3d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(F.instance_norm(x))))


@MODELS.register_module()
class SegMambaEncoder(Backbone):
    """The encoder of SegMamba: maps of a volume at strides 2, 4, 8 and 16.

    :class:`vmamba_mm.heads.SegMamba` is the whole network.

    Args:
        arch: a key of ``SegMambaEncoder.arch_settings``, or a dict with the keys ``embed_dims``
            (channels of the 4 stages), ``depths`` (their blocks), ``d_state`` (N) and
            ``num_slices``: into how many equal parts the tokens of each stage are cut for the order
            across slices, 4 ints, or 'depth' for the slices that the map of a stage has. The
            published counts are those of the slices of a volume that is 128 deep; of another one
            they cut across slices. With ``base``, the name of a published one, only the keys that
            differ from it. The default is 'base'.
        in_channels: of the volume, such as 4 of an MRI of four kinds.
        out_indices: stages to return; all by default.
        drop_path_rate, frozen_stages, norm_eval, with_cp, compile, init_cfg: as of
            :class:`Backbone`. The public code has no stochastic depth.

    Shape:
        (B, in_channels, D, H, W) to a tuple of (B, C_i, D / 2^(i + 1), H / 2^(i + 1),
        W / 2^(i + 1)). Sides that are no multiples of 16 get zeros at their end first.

    Raises:
        ValueError: on a value that is not allowed, with the choices; on a volume of no more than
            16 voxels along every side, whose deepest map would be a single position, which
            instance norm makes 0.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'base'
    classifier_options = MappingProxyType(dict(out_indices=(0, 1, 2, 3)))

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(arch['embed_dims'])

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        return [2, 4, 8, STRIDE]

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = self.arch, iter(drop_path_rates), self.num_features
        counts = arch['num_slices']
        self.patch_embed = VolumeStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, self.depths, strict=True)):
            blocks = [TriMambaBlock(TriMambaMixer(dim, d_state=arch['d_state']), dim,
                                    None if counts == 'depth' else counts[i], next(rates), with_cp)
                      for _ in range(depth)]
            self.stages.append(SegMambaStage(
                GatedSpatialConv(dim), blocks,
                VolumeDownsample(dim, dims[i + 1]) if i + 1 < len(dims) else None))
        for i in self.out_indices:
            self.add_module(f'norm{i}', SkipMlp(dims[i]))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some stages before the downsampling, each (B, D, H, W, C).

        Args:
            x: (B, in_channels, D, H, W).
            indices: increasing numbers of stages; none after the last one runs.
        """
        maps = super().forward_stages(pad_volume(x, STRIDE), indices)
        return [y.movedim(1, -1) for y in maps]
