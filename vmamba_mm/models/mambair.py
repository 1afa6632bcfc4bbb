"""MambaIR: state-space models for image restoration (arXiv 2402.15648), and its U-Net."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vmamba_mm.families.mambair import FAMILY
from vmamba_mm.families.mambair_unet import FAMILY as UNET
from vmamba_mm.layers import SS2D, DropPath, LayerNorm
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.restorer import (
    GroupRestorer,
    ResidualGroup,
    Restorer,
    body_conv,
    on_channels_first,
    run_block,
)
from vmamba_mm.registry import MODELS


class ChannelAttention(nn.Module):
    """A map times a sigmoid for each channel, of a small MLP on the map's mean.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, squeeze: int):
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim // squeeze, 1), nn.ReLU(),
            nn.Conv2d(dim // squeeze, dim, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class ChannelAttentionBlock(nn.Module):
    """Convolutions and channel attention, in the place of a block's MLP (section 3.3).

    Args:
        dim: C, at least 30.
        kind: 'full' for 3x3 convolutions through C / 3 channels. Those of the lightweight models
            have changed twice in the public code: 'light' (2024-10, arXiv 2411.15269 has its
            numbers) has pointwise and depthwise convolutions, 'light_2024_03' 3x3 ones through
            C / 6 channels, and 'light_2024_02' a single depthwise one.

    Shape: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        if kind == 'light':
            half = dim // 2
            convs = [nn.Conv2d(dim, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half),
                     nn.GELU(), nn.Conv2d(half, dim, 1),
                     nn.Conv2d(dim, dim, 3, padding=2, groups=dim, dilation=2)]
        elif kind == 'light_2024_02':
            convs = [nn.Conv2d(dim, dim, 3, padding=1, groups=dim)]
        else:
            width = dim // (3 if kind == 'full' else 6)
            convs = [nn.Conv2d(dim, width, 3, padding=1), nn.GELU(),
                     nn.Conv2d(width, dim, 3, padding=1)]
        self.cab = nn.Sequential(*convs, ChannelAttention(dim, squeeze=30))

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class RestorationBlock(nn.Module):
    """x * scale + SS2D(norm(x)), then x * scale + convolutions(norm(x)), figure 2.

    Args:
        dim: C.
        d_state, ssm_ratio: of :class:`vmamba_mm.layers.SS2D`.
        cab: kind of :class:`ChannelAttentionBlock`.
        drop_path: probability to drop the branch of SS2D; that of the convolutions stays.
        with_cp: recompute the block in the backward pass.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, *, d_state: int, ssm_ratio: float, cab: str,
                 drop_path: float = 0.0, with_cp: bool = False):
        super().__init__()
        self.with_cp = with_cp
        self.skip_scale = nn.Parameter(torch.ones(dim))
        self.skip_scale2 = nn.Parameter(torch.ones(dim))
        self.ln_1 = LayerNorm(dim, feeds_matmul=True)
        self.self_attention = SS2D(dim, d_state=d_state, ssm_ratio=ssm_ratio, conv_bias=True,
                                   gate=True)
        self.drop_path = DropPath(drop_path)
        self.conv_blk = ChannelAttentionBlock(dim, cab)
        self.ln_2 = LayerNorm(dim, feeds_matmul=True)

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self, x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(x)))
        return x * self.skip_scale2 + on_channels_first(self.conv_blk, self.ln_2(x))


@MODELS.register_module()
class MambaIR(GroupRestorer):
    """MambaIR, of super-resolution, denoising and JPEG artefacts.

    Its weights have the official names; files of the public code, a dict with ``params`` or
    ``params_ema``, load by ``load_pretrained`` as they are.

    Args:
        arch: a key of ``MambaIR.arch_settings``, or a dict with the keys ``embed_dims`` (C, at
            least 30), ``depths`` (blocks of each residual group), ``d_state`` (N), ``ssm_ratio``
            (D / C), ``cab`` (kind of :class:`ChannelAttentionBlock`), ``resi_connection``
            ('1conv' or '3conv'), ``upsampler`` and ``upscale``: 'pixelshuffle' with 2, 3, 4 or 8,
            'pixelshuffledirect' with any, 'nearest+conv' with 4, or '' with 1, which adds the
            image (denoising, JPEG). With ``base``, the name of a published one, only the keys that
            differ from it.
        in_channels: 3 for colour, 1 for grey.
        img_range: the image is multiplied by it first; 1 of all published models.
        drop_path_rate, with_cp, init_cfg: as of
            :class:`vmamba_mm.models.restorer.Restorer`. Training as published has a
            ``drop_path_rate`` of 0.1.

    Shape:
        (B, in_channels, H, W), any H and W, with values in [0, 1], to
        (B, in_channels, upscale * H, upscale * W), which is not clipped.

    Raises:
        ValueError: on a value that is not allowed, with the choices; when called, on an image of
            other channels.
    """

    family = FAMILY

    def build(self, drop_path_rate: float) -> None:
        super().build(drop_path_rate)
        self.apply(init_linear)

    def build_groups(self, rates: Sequence[Sequence[float]]) -> Iterable[nn.Module]:
        dim, arch = self.arch['embed_dims'], self.arch
        for group in rates:
            blocks = [RestorationBlock(
                dim, d_state=arch['d_state'], ssm_ratio=arch['ssm_ratio'], cab=arch['cab'],
                drop_path=rate, with_cp=self.with_cp) for rate in group]
            yield ResidualGroup(blocks, body_conv(dim, arch['resi_connection']))

    def forward(self, x: Tensor) -> Tensor:
        self.check_image(x)
        return self.restore(x, self._run_groups)

    def _run_groups(self, x: Tensor) -> Tensor:
        for group in self.layers:
            x = group(x)
        return x


# --- real denoising -------------------------------------------------------------------------------

class _Shuffle(nn.Module):
    """A convolution without bias, and pixels to channels (half the size) or back (twice)."""

    def __init__(self, dim: int, is_up: bool):
        super().__init__()
        out, shuffle = (2 * dim, nn.PixelShuffle(2)) if is_up else \
            (dim // 2, nn.PixelUnshuffle(2))
        self.body = nn.Sequential(nn.Conv2d(dim, out, 3, padding=1, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        return on_channels_first(self.body, x)


@MODELS.register_module()
class MambaIRUNet(Restorer):
    """MambaIR's U-Net for real noise, of Restormer's layout (arXiv 2111.09881).

    Args:
        arch: a key of ``MambaIRUNet.arch_settings``, or a dict with the keys ``embed_dims`` (C of
            the first level, doubled at each further one; at least 30 and even), ``depths`` (blocks
            of the four levels, in the encoder and in the decoder), ``refinement_depth`` (blocks
            after it), ``d_state`` (N) and ``ssm_ratio`` (D / C). With ``base``, the name of a
            published one, only the keys that differ from it.
        in_channels, drop_path_rate, with_cp, init_cfg: as of
            :class:`vmamba_mm.models.restorer.Restorer`. The public code drops no paths.

    Shape:
        (B, in_channels, H, W) -> (B, in_channels, H, W), H and W multiples of 8.
        :func:`vmamba_mm.mm.restoration.tiles.restore_padded` takes other images.

    Raises:
        ValueError: on a value that is not allowed, with the choices; when called, on an image of
            other channels, or whose sides are no multiples of 8.
    """

    family = UNET
    first_conv = 'patch_embed.proj.weight'

    @property
    def size_multiple(self) -> int:
        return 8

    def build(self, drop_path_rate: float) -> None:
        dim, arch, channels = self.arch['embed_dims'], self.arch, self.in_channels
        one, two, three, four = arch['depths']
        counts = dict(encoder_level1=(dim, one), encoder_level2=(2 * dim, two),
                      encoder_level3=(4 * dim, three), latent=(8 * dim, four),
                      decoder_level3=(4 * dim, three), decoder_level2=(2 * dim, two),
                      decoder_level1=(2 * dim, one),  # its skip is not reduced
                      refinement=(2 * dim, arch['refinement_depth']))
        total = sum(count for _, count in counts.values())
        rates = iter(torch.linspace(0, drop_path_rate, total, device='cpu').tolist())
        levels = {name: nn.Sequential(*(RestorationBlock(
            width, d_state=arch['d_state'], ssm_ratio=arch['ssm_ratio'], cab='full',
            drop_path=next(rates), with_cp=self.with_cp) for _ in range(count)))
            for name, (width, count) in counts.items()}
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(channels, dim, 3, padding=1,
                                                             bias=False)))
        between = dict(encoder_level1=dict(down1_2=_Shuffle(dim, False)),
                       encoder_level2=dict(down2_3=_Shuffle(2 * dim, False)),
                       encoder_level3=dict(down3_4=_Shuffle(4 * dim, False)),
                       latent=dict(up4_3=_Shuffle(8 * dim, True),
                                   reduce_chan_level3=nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)),
                       decoder_level3=dict(
                           up3_2=_Shuffle(4 * dim, True),
                           reduce_chan_level2=nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)),
                       decoder_level2=dict(up2_1=_Shuffle(2 * dim, True)))
        for name, level in levels.items():  # in the order of the public code
            self.add_module(name, level)
            for key, module in between.get(name, {}).items():
                self.add_module(key, module)
        self.output = nn.Conv2d(2 * dim, channels, 3, padding=1, bias=False)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        self.check_image(x)
        multiple = self.size_multiple
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f'the sides of an image must be multiples of {multiple}, got '
                             f'{tuple(x.shape[2:])}: pad it')
        one = self.encoder_level1(self.patch_embed['proj'](x).permute(0, 2, 3, 1))
        two = self.encoder_level2(self.down1_2(one))
        three = self.encoder_level3(self.down2_3(two))
        y = torch.cat([self.up4_3(self.latent(self.down3_4(three))), three], dim=-1)
        y = self.decoder_level3(on_channels_first(self.reduce_chan_level3, y))
        y = torch.cat([self.up3_2(y), two], dim=-1)
        y = self.decoder_level2(on_channels_first(self.reduce_chan_level2, y))
        y = self.decoder_level1(torch.cat([self.up2_1(y), one], dim=-1))
        return self.output(self.refinement(y).permute(0, 3, 1, 2)) + x
