"""RS-Mamba's encoder, a VMamba with eight routes, for one image or several (arXiv 2404.02668)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vmamba_mm.families.rs_mamba import FAMILY, FIXED, SCANS
from vmamba_mm.families.vmamba import stage_dims
from vmamba_mm.layers import ConvDownsample, ConvStem, VSSBlock, VSSStage
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.registry import MODELS

_SSM_KEYS = 'd_state', 'ssm_ratio', 'dt_rank', 'conv_bias', 'gate', 'scan'


@MODELS.register_module()
class RemoteSensingMamba(Backbone):
    """The encoder of RSM-SS and RSM-CD for mmseg: maps of strides 4 to 32, without norms.

    Args:
        arch: a key of ``RemoteSensingMamba.arch_settings``, or a dict with the keys ``embed_dims``
            (channels C of the first stage, doubled at each further one, or those of the 4 stages),
            ``depths`` (blocks of the 4 stages), ``d_state`` (N), ``ssm_ratio`` (D / C), ``dt_rank``
            ('auto' for ceil(C / 16), or an int), ``mlp_ratio`` (0 for no MLP) and, as it likes,
            ``scan`` ('omnidirectional', as published, or 'omnidirectional-unwrapped', see
            :func:`vmamba_mm.ops.ordered_scan`). With ``base``, the name of a published one, only
            the keys that differ from it. The default is 'tiny'.
        num_images: images that lie one behind the other in the channels, such as two dates of one
            place. Each goes through the same encoder, and the channels of their maps lie one
            behind the other in the result.
        in_channels: of one image.
        out_indices: stages to return; all by default.
        drop_path_rate, frozen_stages, norm_eval, with_cp, compile, init_cfg: as of
            :class:`Backbone`.

    Shape:
        (B, num_images * in_channels, H, W), any H and W of at least 1, to a tuple of
        (B, num_images * C_i, H_i, W_i) with H_i = ceil(H / (4 * 2^i)).

    Raises:
        ValueError: on a value that is not allowed, with the choices; on other channels.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, drop_path_rate: float = 0.0,
                 frozen_stages: int = -1, norm_eval: bool = False, with_cp: bool = False,
                 in_channels: int = 3, compile: bool | Mapping[str, Any] = False,
                 init_cfg: dict | list[dict] | None = None, num_images: int = 1, **leftover):
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f'num_images must be an int of at least 1, got {num_images!r}')
        super().__init__(arch, out_indices, drop_path_rate, frozen_stages, norm_eval, with_cp,
                         in_channels, compile, init_cfg, **leftover)
        self.num_images = num_images

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(stage_dims(arch['embed_dims']))

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {'scan': SCANS[0], **self.arch, **FIXED}, iter(drop_path_rates), \
            self.num_features
        ssm_cfg = {key: arch[key] for key in _SSM_KEYS}
        self.in_channels = in_channels
        self.patch_embed = ConvStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            blocks = [VSSBlock(dims[i], mlp_ratio=arch['mlp_ratio'], drop_path=next(rates),
                               with_cp=with_cp, ssm_cfg=ssm_cfg) for _ in range(depth)]
            downsample = ConvDownsample(dims[i], dims[i + 1]) if i + 1 < len(dims) else None
            self.stages.append(VSSStage(blocks, downsample))
        self.apply(init_linear)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some stages before the downsampling, each (B, H, W, num_images * C).

        Args:
            x: (B, num_images * in_channels, H, W).
            indices: increasing numbers of stages; none after the last one runs.
        """
        if self.num_images == 1:
            return super().forward_stages(x, indices)
        if x.shape[1] != self.num_images * self.in_channels:
            raise ValueError(f'the model takes {self.num_images} images of {self.in_channels} '
                             f'channel(s) one behind the other, and the input has {x.shape[1]}')
        batch = x.shape[0]
        maps = super().forward_stages(x.unflatten(1, (self.num_images, -1)).flatten(0, 1), indices)
        return [y.unflatten(0, (batch, self.num_images)).movedim(1, 3).flatten(3) for y in maps]
