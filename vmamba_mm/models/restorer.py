"""What networks of image restoration share, whatever their blocks are: image in, image out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.families import Family, resolve_arch
from vmamba_mm.layers import LayerNorm
from vmamba_mm.models.pretrained import StrictLoading

#: Of DIV2K's images, in RGB; other images than those of 3 channels are not shifted.
RGB_MEAN = (0.4488, 0.4371, 0.4040)
#: Channels between the body and the image, in all upsamplers but 'pixelshuffledirect'.
TAIL_WIDTH = 64
#: How the names of weights behind the body begin.
TAIL = ('conv_before_upsample.', 'upsample.', 'conv_up', 'conv_hr.', 'conv_last.')


class Restorer(StrictLoading, BaseModule):
    """A network from a degraded image to the restored one, ``scale`` times as large.

    A subclass says ``family`` and :meth:`build`, and has ``forward``.

    Args:
        arch: a key of ``arch_settings``, or a dict with the keys of the family's ``rules``; with
            ``base``, the name of a published one, only the keys that differ from it.
        in_channels: of the image, and of the restored one.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``.
    """

    family: Family
    arch_settings: Mapping[str, Mapping[str, Any]]
    #: The weight whose second dimension is the channels of the image.
    first_conv = 'conv_first.weight'

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'family' in vars(cls):
            cls.arch_settings = cls.family.archs

    def __init__(self, arch: str | Mapping[str, Any], in_channels: int = 3,
                 drop_path_rate: float = 0.0, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be an int of at least 1, got {in_channels!r}')
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        self.arch = resolve_arch(self.family, arch)
        self.in_channels, self.with_cp = in_channels, with_cp
        self.build(drop_path_rate)

    def build(self, drop_path_rate: float) -> None:
        """Make the modules, with their initial weights."""
        raise NotImplementedError

    @property
    def scale(self) -> int:
        """How many times as high and wide the restored image is."""
        return self.arch.get('upscale', 1)

    @property
    def size_multiple(self) -> int:
        """What the sides of an image must be multiples of."""
        return 1

    def check_image(self, x: Tensor) -> None:
        """Raise a line on what is no batch of images of this network's channels."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'this {self.family.model} takes images (B, {self.in_channels}, H, W), got '
                f'{tuple(x.shape)}' + (': repeat a grey image three times, x.expand(-1, 3, -1, -1)'
                                       if x.dim() == 4 and x.shape[1] == 1 else ''))
        if min(x.shape[2:]) < 1:
            raise ValueError(f'this {self.family.model} got an image without pixels, '
                             f'{tuple(x.shape)}')

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(in_channels=weights[cls.first_conv].shape[1])

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        plain = next(cls for cls in type(self).__mro__ if 'family' in vars(cls))
        with torch.device('meta'):
            return plain(self.arch if arch is None else arch, self.in_channels).state_dict()


class ResidualGroup(nn.Module):
    """Blocks, a convolution and a residual connection.

    Args:
        blocks: of maps (B, H, W, C).
        conv: of maps (B, C, H, W), see :func:`body_conv`.
        name: of the list of blocks among the weights.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, blocks: Iterable[nn.Module], conv: nn.Module, name: str = 'blocks'):
        super().__init__()
        self.residual_group = nn.ModuleDict({name: nn.ModuleList(blocks)})
        self.conv = conv
        self.name = name

    def forward(self, x: Tensor, *extra: Any) -> Tensor:
        y = x
        for i, block in enumerate(self.residual_group[self.name]):
            y = block(y, *(values[i] for values in extra))
        return on_channels_first(self.conv, y) + x


class GroupRestorer(Restorer):
    """Residual groups between a convolution and an upsampler, as in SwinIR (arXiv 2108.10257).

    A subclass has :meth:`build_groups`, and gives them to ``forward_groups`` what else they take.

    Args:
        img_range: the image is multiplied by it first, and the restored one divided.
    """

    def __init__(self, arch: str | Mapping[str, Any], in_channels: int = 3, img_range: float = 1.0,
                 drop_path_rate: float = 0.0, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        if not isinstance(img_range, (int, float)) or not img_range > 0:
            raise ValueError(f'img_range must be a number above 0, got {img_range!r}')
        super().__init__(arch, in_channels, drop_path_rate, with_cp, init_cfg)
        self.img_range = float(img_range)
        mean = RGB_MEAN if in_channels == 3 else (0.0,) * in_channels
        # It follows the device and the dtype, and is in no file.
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1), persistent=False)

    def build(self, drop_path_rate: float) -> None:
        dim, arch, channels = self.arch['embed_dims'], self.arch, self.in_channels
        self.conv_first = nn.Conv2d(channels, dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict(dict(norm=LayerNorm(dim)))
        depths = arch['depths']
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        self.layers = nn.ModuleList(self.build_groups(
            [[next(rates) for _ in range(depth)] for depth in depths]))
        self.norm = LayerNorm(dim)
        self.conv_after_body = body_conv(dim, arch['resi_connection'])
        build_tail(self, dim, channels, arch['upsampler'], arch['upscale'])

    def build_groups(self, rates: Sequence[Sequence[float]]) -> Iterable[nn.Module]:
        """The groups; ``rates`` has the stochastic depth of each block of each."""
        raise NotImplementedError

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        other_scale: bool = False) -> None:
        """As of the other models; with ``other_scale``, start from weights for another scale.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :class:`vmamba_mm.models.base.Backbone`.
            other_scale: what lies behind the body is loaded where it has the same shape, and stays
                as it is otherwise, as the published models for x3 and x4 started from that for x2.
        """
        def adapt(state):
            ours = self.state_dict()
            return {k: v for k, v in ours.items() if k.startswith(TAIL)} | {
                k: v for k, v in state.items() if not k.startswith(TAIL)
                or k in ours and ours[k].shape == v.shape}

        self._load(adapt if other_scale else self.adapt_weights, checkpoint, prefix, weights,
                   map_location, adapt_in_channels, strict, allow)

    def restore(self, x: Tensor, groups: Any) -> Tensor:
        """(B, in_channels, H, W) -> (B, in_channels, scale * H, scale * W).

        Args:
            x: the image.
            groups: (map (B, H, W, C)) -> the same, what the groups make of it.
        """
        mean = self.mean.to(x.dtype)
        x = (x - mean) * self.img_range
        first = self.conv_first(x)
        y = self.patch_embed['norm'](first.permute(0, 2, 3, 1))
        y = on_channels_first(self.conv_after_body, self.norm(groups(y)))
        y = run_tail(self, y.permute(0, 3, 1, 2) + first, x, self.arch['upsampler'])
        return y / self.img_range + mean


def on_channels_first(module: nn.Module, x: Tensor) -> Tensor:
    """A module of maps (B, C, H, W) on a map (B, H, W, C), and back."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def run_block(block: nn.Module, *inputs: Any) -> Tensor:
    """``block._forward``, recomputed in the backward pass if the block wants that."""
    if block.with_cp and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(block._forward, *inputs, use_reentrant=False)
    return block._forward(*inputs)


def body_conv(dim: int, kind: str) -> nn.Module:
    """The convolution after blocks: '1conv', or '3conv' through a quarter of the channels."""
    if kind == '1conv':
        return nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2), nn.Conv2d(dim // 4, dim, 3, padding=1))


# --- from the body's map to the image -----------------------------------------------------------

def build_tail(model: nn.Module, dim: int, channels: int, upsampler: str, upscale: int) -> None:
    """Give a model the modules of its upsampler, by the names that files have.

    Args:
        dim, channels: of the map and of the image.
        upsampler: '' for none, with the image added; 'pixelshuffle', 'pixelshuffledirect' or
            'nearest+conv'.
        upscale: of 'pixelshuffle' a power of 2 or 3, of 'nearest+conv' 4.
    """
    if upsampler == 'pixelshuffledirect':
        model.upsample = nn.Sequential(
            nn.Conv2d(dim, upscale ** 2 * channels, 3, padding=1), nn.PixelShuffle(upscale))
        return
    if upsampler:
        model.conv_before_upsample = nn.Sequential(
            nn.Conv2d(dim, TAIL_WIDTH, 3, padding=1), nn.LeakyReLU())
    if upsampler == 'pixelshuffle':
        steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
        model.upsample = nn.Sequential(*(
            module for step in steps for module in (
                nn.Conv2d(TAIL_WIDTH, step ** 2 * TAIL_WIDTH, 3, padding=1),
                nn.PixelShuffle(step))))
    elif upsampler == 'nearest+conv':
        for name in ('conv_up1', 'conv_up2', 'conv_hr'):
            model.add_module(name, nn.Conv2d(TAIL_WIDTH, TAIL_WIDTH, 3, padding=1))
    model.conv_last = nn.Conv2d(TAIL_WIDTH if upsampler else dim, channels, 3, padding=1)


def run_tail(model: nn.Module, y: Tensor, x: Tensor, upsampler: str) -> Tensor:
    """The restored image of a map ``y`` (B, C, H, W); ``x`` is the image, (B, channels, H, W)."""
    if upsampler == 'pixelshuffledirect':
        return model.upsample(y)
    if not upsampler:
        return x + model.conv_last(y)
    y = model.conv_before_upsample(y)
    if upsampler == 'pixelshuffle':
        return model.conv_last(model.upsample(y))
    for conv in (model.conv_up1, model.conv_up2):
        y = F.leaky_relu(conv(F.interpolate(y, scale_factor=2, mode='nearest')), 0.2)
    return model.conv_last(F.leaky_relu(model.conv_hr(y), 0.2))
