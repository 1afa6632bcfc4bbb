"""U-Mamba: a residual U-Net of images or volumes with Mamba layers (arXiv 2401.04722)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch
from vmamba_mm.families.u_mamba import FAMILY, first_name, token_widths, total_strides
from vmamba_mm.layers import LayerNorm, MambaMixer
from vmamba_mm.layers.plain import is_plain
from vmamba_mm.models.pretrained import StrictLoading, is_same
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes, or at who watches a module.
torch.fx.wrap('_activate')

#: Of images and of volumes.
_CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_SLOPE = 0.01


class MambaLayer(nn.Module):
    """LayerNorm and Mamba on the tokens of a map, in one direction and without a residual.

    Mamba runs in the dtype of its weights, which is fp32 under autocast, as published.

    Args:
        dim: channels of a token.
        channel_token: the tokens are the channels of the map, whose positions must then be
            ``dim``; else they are its positions, row by row, whose channels are ``dim``.

    Shape: (B, C, ...) -> (B, C, ...), with 2 or 3 sizes.
    """

    def __init__(self, dim: int, channel_token: bool = False):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.mamba = MambaMixer(dim)
        self.channel_token = channel_token

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if not self.channel_token:
            tokens = tokens.transpose(1, 2)
        tokens = self.norm(tokens)  # in fp32 under autocast, of a map in half precision too
        with torch.autocast(x.device.type, enabled=False):
            y = self.mamba(tokens.to(self.norm.weight.dtype))
        if not self.channel_token:
            y = y.transpose(1, 2)
        y = y.unflatten(2, x.shape[2:])
        # On a CPU the backward of a 1x1 convolution with strides, such as comes next, writes past
        # its memory for channels-last maps of few channels (oneDNN in torch 2.14.1).
        return y.contiguous() if y.device.type == 'cpu' else y


class _ResBlock(nn.Module):
    """Two convolutions with instance norms, and a 1x1 convolution around them."""

    def __init__(self, in_channels: int, channels: int, kernel_size: Sequence[int],
                 stride: Sequence[int] | int = 1):
        super().__init__()
        conv, norm, padding = _layers_of(kernel_size)
        self.conv1 = conv(in_channels, channels, kernel_size, stride, padding)
        self.norm1 = norm(channels, affine=True)
        self.conv2 = conv(channels, channels, kernel_size, padding=padding)
        self.norm2 = norm(channels, affine=True)
        self.conv3 = conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = _activate(self.norm1(self.conv1(x)), self.norm1)
        y = self.norm2(self.conv2(y)) + self.conv3(x)
        return F.leaky_relu_(y, _SLOPE)


class _ConvNorm(nn.Module):
    """A convolution and an instance norm, which have a second name each."""

    def __init__(self, channels: int, kernel_size: Sequence[int]):
        super().__init__()
        conv, norm, padding = _layers_of(kernel_size)
        self.conv = conv(channels, channels, kernel_size, padding=padding)
        self.norm = norm(channels, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _PlainBlock(nn.Module):
    """Two convolutions with instance norms and a residual connection."""

    def __init__(self, channels: int, kernel_size: Sequence[int]):
        super().__init__()
        self.conv1 = _ConvNorm(channels, kernel_size)
        self.conv2 = _ConvNorm(channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        y = _activate(self.conv1(x), self.conv1, self.conv1.norm)
        return F.leaky_relu_(self.conv2(y) + x, _SLOPE)


class _Upsample(nn.Module):
    """Each position repeated, and a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: Sequence[int]):
        super().__init__()
        self.conv = _CONVS[len(stride)](in_channels, channels, 1)
        self.stride = tuple(map(float, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.stride, mode='nearest'))


class _Encoder(nn.Module):
    """A stem and stages, each with a Mamba layer behind it in the variant 'enc'."""

    def __init__(self, arch: Mapping[str, Any], in_channels: int, with_cp: bool):
        super().__init__()
        features, kernels = arch['features_per_stage'], arch['kernel_sizes']
        depths, inputs = arch['n_conv_per_stage'], (features[0], *features)
        self.with_cp = with_cp
        self.stem = _stage(in_channels, features[0], kernels[0], depths[0])
        if arch['variant'] == 'enc':
            self.mamba_layers = nn.ModuleList(
                nn.Identity() if layer is None else MambaLayer(*layer)
                for layer in token_widths(arch))
        else:
            self.mamba_layers = None
        self.stages = nn.ModuleList(
            _stage(inputs[i], features[i], kernels[i], depths[i], arch['strides'][i])
            for i in range(len(features)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, ...) to the map of each stage."""
        x, maps = _run(self.stem, x, self.with_cp), []
        for i, stage in enumerate(self.stages):
            x = _run(stage, x, self.with_cp)
            if self.mamba_layers is not None:
                x = self.mamba_layers[i](x)
            maps.append(x)
        return maps


class _Decoder(nn.Module):
    """Stages from the bottom up, each with a 1x1 convolution that gives logits."""

    def __init__(self, encoder: _Encoder, arch: Mapping[str, Any], num_classes: int,
                 deep_supervision: bool, with_cp: bool):
        super().__init__()
        features, kernels = arch['features_per_stage'][::-1], arch['kernel_sizes'][::-1]
        strides, count = arch['strides'][::-1], len(features) - 1
        #: for nnU-Net, which sets it during training
        self.deep_supervision = deep_supervision
        self.with_cp = with_cp
        self.encoder = encoder  # for its names alone: files have the encoder here once more
        # In networks of images, nothing is concatenated at full resolution.
        self.num_skips = count - 1 if len(strides[0]) == 2 else count
        self.stages = nn.ModuleList(
            _stage((1 + (i < self.num_skips)) * features[i + 1], features[i + 1], kernels[i + 1],
                   depth) for i, depth in enumerate(arch['n_conv_per_stage_decoder']))
        self.upsample_layers = nn.ModuleList(
            _Upsample(features[i], features[i + 1], strides[i]) for i in range(count))
        conv = _CONVS[len(strides[0])]
        self.seg_layers = nn.ModuleList(
            conv(features[i + 1], num_classes, 1) for i in range(count))

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The encoder's maps to logits, those of full resolution first."""
        x, logits, last = maps[-1], [], len(self.stages) - 1
        for i, (upsample, stage) in enumerate(zip(self.upsample_layers, self.stages, strict=True)):
            x = upsample(x)
            if i < self.num_skips:
                x = torch.cat([x, maps[last - i].to(x.dtype)], dim=1)
            x = _run(stage, x, self.with_cp)
            if self.deep_supervision or i == last:
                logits.append(self.seg_layers[i](x))
        return logits[::-1] if self.deep_supervision else logits[0]


@MODELS.register_module()
class UMamba(StrictLoading, BaseModule):
    """U-Mamba, a whole network for the segmentation of images or volumes.

    A residual U-Net as nnU-Net plans them, with Mamba at the bottom (variant 'bot') or after stages
    of the encoder ('enc'). It returns logits. Its weights have the official names, those twice that
    the public code has twice. As trainers of nnU-Net: :mod:`vmamba_mm.integrations.nnunet`.

    Args:
        arch: a key of ``UMamba.arch_settings``, or a dict with the keys

            - ``variant``: 'bot' or 'enc';
            - ``features_per_stage``: channels of each stage; ``kernel_sizes`` and ``strides``: of
              each stage, by axis, 2 ints of images or 3 of volumes;
            - ``n_conv_per_stage`` and ``n_conv_per_stage_decoder``: residual blocks of each stage,
              those of the decoder from the bottom up. A plan of nnU-Net has more than the public
              code builds: :func:`vmamba_mm.families.u_mamba.arch_of_plan` gives its arch;
            - of 'enc', ``input_size``: the size of all images or volumes. Where a map has no more
              positions than channels, Mamba's tokens are its channels, so that the network takes
              this size alone. None (the default) for positions as tokens everywhere, and any size.

            With ``base``, the name of a published one, only the keys that differ from it.
        num_classes: channels of the logits, the background among them.
        in_channels: of the images or volumes.
        deep_supervision: return the logits of every stage of the decoder; also to be set later,
            as ``decoder.deep_supervision``.
        with_cp: recompute each stage in the backward pass (gradient checkpointing).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``.

    Shape:
        (B, in_channels, ...) to (B, num_classes, ...), or with deep supervision to a list of
        these at the resolution of each stage of the decoder, the highest first. Sides must be
        multiples of the product of the strides.

    Raises:
        ValueError: on a value that is not allowed, with the choices; when called, on a size that
            the network does not take.
    """

    family = FAMILY
    arch_settings = FAMILY.archs

    def __init__(self, arch: str | Mapping[str, Any], num_classes: int, in_channels: int = 1,
                 deep_supervision: bool = False, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        for name, value in (('num_classes', num_classes), ('in_channels', in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be an int of at least 1, got {value!r}')
        self.arch = {k: _as_tuple(v) for k, v in resolve_arch(self.family, arch).items()}
        self.num_classes, self.in_channels = num_classes, in_channels
        self.multiples = total_strides(self.arch)[-1]
        layers = token_widths(self.arch)
        self.input_size = self.arch.get('input_size') \
            if any(layer is not None and layer[1] for layer in layers) else None
        self.encoder = _Encoder(self.arch, in_channels, with_cp)
        self.mamba_layer = MambaLayer(*layers[-1]) if self.arch['variant'] == 'bot' else None
        self.decoder = _Decoder(self.encoder, self.arch, num_classes, deep_supervision, with_cp)
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self._check_size(tuple(x.shape[2:]))
        maps = self.encoder(x)
        if self.mamba_layer is not None:
            maps[-1] = self.mamba_layer(maps[-1])
        return self.decoder(maps)

    def _check_size(self, size):
        if self.input_size is not None and size != self.input_size:
            raise ValueError(f'this UMamba takes the size {self.input_size} alone, its input_size, '
                             f'since its tokens are channels in some stages; got {size}: use a '
                             'sliding window of that size')
        if len(size) != len(self.multiples) or any(
                n % step for n, step in zip(size, self.multiples, strict=True)):
            raise ValueError(f'the sizes of an image or volume must be multiples of '
                             f'{self.multiples}, the product of the strides; got {size}: pad it')

    # --- weights ----------------------------------------------------------------------------

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(in_channels=weights['encoder.stem.0.conv1.weight'].shape[1],
                    num_classes=weights['decoder.seg_layers.0.weight'].shape[0])

    def complete_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights by all of their names; files may have each of them once."""
        held: dict[str, tuple[str, Tensor]] = {}
        for name, value in weights.items():
            first = first_name(name)
            other, kept = held.setdefault(first, (name, value))
            if not is_same(kept, value):
                raise UserError(f'{other} and {name} are two names of one weight, and have '
                                'different values')
        return weights | {name: held[first][1] for name in self.state_dict()
                          if name not in weights and (first := first_name(name)) in held}

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        with torch.device('meta'):
            return UMamba(self.arch if arch is None else arch, self.num_classes,
                          self.in_channels).state_dict()


def _layers_of(kernel_size):
    """Convolution, norm, and the padding that keeps sizes."""
    dimensions = len(kernel_size)
    return _CONVS[dimensions], _NORMS[dimensions], tuple(n // 2 for n in kernel_size)


def _stage(in_channels, channels, kernel_size, depth, stride=1):
    return nn.Sequential(_ResBlock(in_channels, channels, kernel_size, stride),
                         *(_PlainBlock(channels, kernel_size) for _ in range(depth - 1)))


def _activate(x: Tensor, *sources: nn.Module) -> Tensor:
    """Leaky ReLU, in place unless somebody watches the modules that ``x`` comes from."""
    in_place = all(is_plain(source, type(source)) for source in sources)
    return F.leaky_relu(x, _SLOPE, inplace=in_place)


def _run(stage: nn.Module, x: Tensor, with_cp: bool) -> Tensor:
    if with_cp and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
    return stage(x)


def _init_conv(module: nn.Module) -> None:
    """He's initialisation, of the convolutions of images and volumes alone."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        nn.init.zeros_(module.bias)


def _as_tuple(value):
    """Lists as tuples, inside too: configs have either."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value
