"""SegMamba for volumes (arXiv 2401.13560): its decoder, and the whole network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import require_equal
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.checkpoints.prefixes import inside
from vmamba_mm.families.seg_mamba import FAMILY
from vmamba_mm.layers.positions import pad_volume
from vmamba_mm.models import SegMambaEncoder
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('pad_volume')
torch.fx.wrap('_crop_like')

_SLOPE = 0.01


class ResidualConv(nn.Module):
    """Two 3x3x3 convolutions with instance norm and leaky ReLU, and a residual, which a 1x1x1
    convolution brings to other channels (MONAI's ``UnetResBlock``).

    Shape: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv3 = None
        if in_channels != out_channels:
            self.conv3 = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), _SLOPE)
        y = F.instance_norm(self.conv2(y))
        if self.conv3 is not None:
            x = F.instance_norm(self.conv3(x))
        return F.leaky_relu(y + x, _SLOPE)


class ResidualUp(ResidualConv):
    """Twice the size by a transposed convolution, the skip beside it, and :class:`ResidualConv`
    (MONAI's ``UnetrUpBlock``).

    Shape: (B, in_channels, D, H, W) and a skip (B, out_channels, 2D, 2H, 2W) to that of the skip.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(2 * out_channels, out_channels)
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(torch.cat((self.up(x), skip), dim=1))


@MODELS.register_module()
class ResidualDecoder(nn.Module):
    """The decoder of SegMamba: that of UNETR (arXiv 2103.10504) on maps of strides 2, 4, 8, 16.

    The volume and every map go through a convolution block, which brings each to the channels of
    the next map, and the last one to ``hidden_dims``; from the deepest on, they are joined.

    Args:
        in_channels: C_i of the maps, from the largest on.
        num_classes: of the logits, the background among them.
        image_channels: of the volume.
        hidden_dims: channels after the deepest map.

    Shape: (B, image_channels, D, H, W), and (B, C_i, D / 2^(i + 1), H / 2^(i + 1),
    W / 2^(i + 1)), of sides brought to multiples of the last stride, to logits
    (B, num_classes, D, H, W).
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, image_channels: int,
                 hidden_dims: int = 768):
        super().__init__()
        self.stride = 2 ** len(in_channels)
        dims = [*in_channels, hidden_dims]
        self.skips = nn.ModuleList(
            ResidualConv(*pair) for pair in zip([image_channels, *in_channels], dims, strict=True))
        self.ups = nn.ModuleList(ResidualUp(deep, high) for high, deep in
                                 reversed(list(zip(dims[:-1], dims[1:], strict=True))))
        self.last = ResidualConv(dims[0], dims[0])
        self.conv_seg = nn.Conv3d(dims[0], num_classes, 1)

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        maps = (pad_volume(image, self.stride), *maps)
        *skips, x = (skip(y) for skip, y in zip(self.skips, maps, strict=True))
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return _crop_like(self.conv_seg(self.last(x)), image)


def _crop_like(x: Tensor, image: Tensor) -> Tensor:
    """(B, C', D', H', W') without what lies beyond the volume (B, C, D, H, W)."""
    depth, height, width = image.shape[2:]
    return x[:, :, :depth, :height, :width]


@MODELS.register_module()
class SegMamba(nn.Module):
    """SegMamba as a network in the manner of MONAI: logits of a volume.

    It is what MONAI's inferers, losses and metrics take, and needs nothing of MONAI. Weights of the
    public code load as they are, by :meth:`load_pretrained` or ``load_state_dict``.

    Args:
        in_channels: of the volume.
        out_channels: classes, the background among them.
        arch: as of :class:`vmamba_mm.models.SegMambaEncoder`.
        hidden_dims: channels after the deepest map.
        drop_path_rate, with_cp: as of :class:`vmamba_mm.models.SegMambaEncoder`.

    Shape: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W), any sides of which one at least
    is above 16. Sides that are no multiples of 16 get zeros at their end, which are cut off again;
    the public code takes none.

    Raises:
        ValueError: on a value that is not allowed, and on a volume that is too small.
    """

    def __init__(self, in_channels: int = 4, out_channels: int = 4,
                 arch: str | Mapping[str, Any] = 'base', hidden_dims: int = 768,
                 drop_path_rate: float = 0.0, with_cp: bool = False):
        super().__init__()
        for name, value in dict(out_channels=out_channels, hidden_dims=hidden_dims).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be an int of at least 1, got {value!r}')
        self.backbone = SegMambaEncoder(arch, in_channels=in_channels, with_cp=with_cp,
                                        drop_path_rate=drop_path_rate)
        self.decode_head = ResidualDecoder(self.backbone.num_features, out_channels, in_channels,
                                           hidden_dims)
        self.register_load_state_dict_pre_hook(_take_official_names)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(x, self.backbone(x))

    def load_pretrained(self, checkpoint: str, weights: str = 'auto', map_location: Any = 'cpu'
                        ) -> None:
        """Load all weights of a checkpoint, or raise.

        Args:
            checkpoint, weights, map_location: as of
                :func:`vmamba_mm.checkpoints.files.read_checkpoint`, such as ``final_model_*.pt`` of
                the public code.

        Raises:
            UserError: if the file cannot be read, or any weight is missing, left over or of another
                shape. The model is then as it was.
        """
        content = read_checkpoint(checkpoint, weights, map_location, family=FAMILY)
        found = content.get('state_dict', content)
        require_equal(self.state_dict(), found, str(checkpoint))
        self.load_state_dict(found)


def _take_official_names(module, state_dict, prefix, *args):
    """Rename the weights of the public code in a state dict that is about to be loaded."""
    below = inside(state_dict, prefix)
    if any(name.startswith(FAMILY.place) for name in below):
        renamed = to_mm(below, family=FAMILY)
        for name in below:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: value for name, value in renamed.items()})
