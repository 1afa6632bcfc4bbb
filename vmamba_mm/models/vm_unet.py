"""VM-UNet: encoder and decoder of VSS blocks (arXiv 2402.02491)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from mmengine.logging import MMLogger
from torch import Tensor, nn

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.prefixes import inside
from vmamba_mm.errors import UserError
from vmamba_mm.families.vm_unet import FAMILY, VANILLA
from vmamba_mm.families.vmamba import FAMILY as VMAMBA
from vmamba_mm.layers import MergeDownsample, PatchExpand, PatchStem, VSSBlock, VSSStage
from vmamba_mm.layers.positions import pad_to_patches
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_crop_like')
torch.fx.wrap('_of_three_channels')
torch.fx.wrap('pad_to_patches')


class UpStage(VSSStage):
    """A stage of the decoder: patch expanding, but in the first, and VSS blocks.

    Shape: (B, H, W, 2C) -> (B, 2H, 2W, C); (B, H, W, C) without expanding.
    """

    def __init__(self, blocks: Sequence[nn.Module], upsample: nn.Module | None):
        super().__init__(blocks, None)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        return self._run_blocks(x if self.upsample is None else self.upsample(x))


@MODELS.register_module()
class VMUNet(Backbone):
    """VM-UNet as a backbone for mmseg, whose last map has the size of the image.

    The stages are those of the encoder, a vanilla VMamba, and then those of the decoder. A stage of
    the decoder but the first expands the sum of what the last one gave and what the encoder's stage
    of that size was given. After the last one comes another expanding, ``final_up``, to the size of
    the image and a quarter of the channels. On it, a head of one 1x1 convolution gives the logits
    of the published model: mmseg's ``FCNHead`` with ``num_convs=0`` and ``concat_input=False``.

    Args:
        arch: a key of ``VMUNet.arch_settings``, or a dict with the keys ``embed_dims`` (C of the
            first stage, doubled at each further one), ``depths`` (blocks of the
            encoder's stages), ``decoder_depths`` (of as many of the decoder) and ``d_state`` (N).
            With ``base``, the name of a published one, only the keys that differ from it. The
            default is 'l2', the published one.
        out_indices: stages to return, those of the decoder counted on; the last one by default.
        drop_path_rate: stochastic depth: it grows from 0 to this through the encoder, and falls
            back to 0 through the decoder.
        frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of :class:`Backbone`.
            The last expanding is never frozen.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i): with 4
        stages on each side of C, 2C, 4C, 8C, 8C, 4C, 2C and C / 4 channels, and the last with H and
        W. Images whose sides are no multiples of 32 get zeros below and on the right, which are cut
        off from the last map; the public code takes none. An image of one channel stands for three
        equal ones, where ``in_channels`` is 3.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'l2'
    returns_last = True

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        dims = [arch['embed_dims'] * 2 ** i for i in range(len(arch['depths']))]
        return ((*arch['depths'], *arch['decoder_depths']),
                [*dims, *dims[:0:-1], max(1, arch['embed_dims'] // 4)])

    @classmethod
    def drop_path_rates(cls, arch: Mapping[str, Any], rate: float) -> list[float]:
        encoder, decoder = (torch.linspace(0, rate, sum(arch[key]), device='cpu').tolist()
                            for key in ('depths', 'decoder_depths'))
        return encoder + decoder[::-1]

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        strides = [4 * 2 ** i for i in range(len(arch['depths']))]
        return [*strides, *strides[:0:-1], 1]

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates = self.arch, iter(drop_path_rates)
        #: stages of the encoder, and of the decoder
        self.half = len(arch['depths'])
        dims = self.num_features[:self.half]
        ssm_cfg = dict(VANILLA, d_state=arch['d_state'])

        def blocks(dim, depth):
            return [VSSBlock(dim, mlp_ratio=0.0, drop_path=next(rates), with_cp=with_cp,
                             ssm_cfg=ssm_cfg) for _ in range(depth)]

        self.patch_embed = PatchStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, arch['depths'], strict=True)):
            downsample = None if i == self.half - 1 else MergeDownsample(dim, odd='crop')
            self.stages.append(VSSStage(blocks(dim, depth), downsample))
        for i, (dim, depth) in enumerate(zip(dims[::-1], arch['decoder_depths'], strict=True)):
            upsample = PatchExpand(2 * dim) if i else None
            self.stages.append(UpStage(blocks(dim, depth), upsample))
        self.final_up = PatchExpand(dims[0], 4)
        self.apply(init_linear)  # the rest starts as torch, or SS2D, sets it

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some stages, each (B, H, W, C): before the downsampling, and of the last
        stage after ``final_up``.

        Args:
            x: (B, in_channels, H, W).
            indices: increasing numbers of stages; none after the last one runs.
        """
        image = _of_three_channels(x, self.patch_embed.proj.in_channels)
        x = self.patch_embed(pad_to_patches(image, 4 * 2 ** (self.half - 1)))
        maps, inputs, last = [], [], len(self.depths) - 1
        for i, stage in enumerate(self.stages[:indices[-1] + 1]):
            if i < self.half:
                inputs.append(x)
                x, stage_map = stage(x, with_map=True)
            else:
                # What the first stage was given, the stem's result, is not used.
                x = stage_map = stage(x if i == self.half else x + inputs[2 * self.half - i])
            if i in indices:
                maps.append(_crop_like(self.final_up(x), image) if i == last else stage_map)
        return maps

    # --- loading ------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        from_vmamba: bool = False) -> None:
        """Load the backbone of a checkpoint, as every :class:`Backbone` does.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :meth:`vmamba_mm.models.pretrained.StrictLoading.load_pretrained`.
            from_vmamba: start both halves from a vanilla VMamba, as published: stem, blocks and
                downsamplings of the encoder, and each block of the decoder from that of this number
                in the encoder's stage of its size. The file may have more blocks. The expandings,
                and blocks that it has not, stay as they are in this model. ``strict`` and ``allow``
                have no effect.

        Raises:
            UserError: as there, and if the file holds a VMamba that is not vanilla or of another
                width.
        """
        if not from_vmamba:
            self._load(self.adapt_weights, checkpoint, prefix, weights, map_location,
                       adapt_in_channels, strict, allow)
            return
        state = read_checkpoint(checkpoint, weights, map_location, family=VMAMBA)['state_dict']
        source = inside(state, f'{(prefix or "backbone").rstrip(".")}.')
        ours, loaded = self.state_dict(), {}
        for name in ours:
            if (held := source.get(self._name_in_vmamba(name))) is not None:
                loaded[name] = held
        if adapt_in_channels:
            self._adapt_stem(loaded, ours, checkpoint)
        needed = [k for k in ours if self._name_in_vmamba(k) == k]  # all of the encoder
        wrong = [f'{k} is missing' for k in needed if k not in loaded] + [
            f'{k} is {tuple(v.shape)}, in the model {tuple(ours[k].shape)}'
            for k, v in loaded.items() if v.shape != ours[k].shape]
        if wrong:
            more = f'; {len(wrong) - 3} more' if len(wrong) > 3 else ''
            raise UserError(f'{checkpoint} holds no vanilla VMamba that this VMUNet can start '
                            f'from: {"; ".join(wrong[:3])}{more}. Take one with as many channels, '
                            'at least as many blocks and the same d_state, such as '
                            'vmamba_mm://vmamba/vanilla_small')
        self.load_state_dict(loaded, strict=False)
        MMLogger.get_current_instance().info(
            f'Loaded {len(loaded)} of {len(ours)} weights from the VMamba in {checkpoint}; the '
            'others start anew')

    def _name_in_vmamba(self, name):
        """The name of the VMamba's weight that one of ours starts from; None if there is none."""
        top, _, rest = name.partition('.')
        number, _, rest = rest.partition('.')
        if top == 'patch_embed' or (top == 'stages' and int(number) < self.half):
            return name
        if top == 'stages' and rest.startswith('blocks.'):
            return f'stages.{2 * self.half - 1 - int(number)}.{rest}'
        return None


def _of_three_channels(x: Tensor, in_channels: int) -> Tensor:
    """(B, 1, H, W) as three equal channels, where the model takes three."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 and in_channels == 3 else x


def _crop_like(x: Tensor, image: Tensor) -> Tensor:
    """(B, H', W', C) without what lies beyond the image (B, C, H, W)."""
    height, width = image.shape[-2:]
    return x[:, :height, :width]
