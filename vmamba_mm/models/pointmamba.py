"""PointMamba for clouds of points (arXiv 2402.10739, section 3), the released version and the early
one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.pointmamba import FAMILY, ORDERS
from vmamba_mm.layers import LayerNorm, MambaBlock, MambaMixer, RMSNorm, run_blocks_to
from vmamba_mm.layers.plain import are_plain
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.points import CURVES, Curve, curve_order, group_points, take_points
from vmamba_mm.ops.points.hilbert import DEPTHS
from vmamba_mm.registry import MODELS

#: The side of a cell of the grid that the Hilbert curves go through, in the units of the points.
GRID_SIZE = 0.02

# What torch.fx records as it is, since it looks at shapes and values.
torch.fx.wrap('curve_order')
torch.fx.wrap('make_groups')
torch.fx.wrap('take_points')


class Groups(NamedTuple):
    """A cloud as groups of neighbours."""

    points: Tensor  #: (B, G, S, C_in), relative to the centres
    centres: Tensor  #: (B, G, 3)
    centre_indices: Tensor  #: (B, G), numbers of points
    indices: Tensor  #: (B, G, S)


class Encoded(NamedTuple):
    """What the blocks make of a cloud."""

    features: list[Tensor]  #: of each output, (B, T, C) after its norm
    centres: Tensor  #: (B, G, 3)
    orders: Tensor  #: (B, K, G): the group that each token is of, in each order


class GroupEmbed(nn.Module):
    """A small PointNet that makes a token of each group (section 3.2).

    Two pointwise layers with a batch norm and ReLU between them, the maximum over the group beside
    each point, two layers more, and the maximum. The batch norms see all points of all groups.

    Args:
        in_channels: of a point.
        embed_dims: C.

    Shape: (B, G, S, in_channels) -> (B, G, C).
    """

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, 128, 1)
        self.norm1 = nn.BatchNorm1d(128)
        self.conv2 = nn.Conv1d(128, 256, 1)
        self.conv3 = nn.Conv1d(512, 512, 1)
        self.norm2 = nn.BatchNorm1d(512)
        self.conv4 = nn.Conv1d(512, embed_dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, x = x.shape[0], x.flatten(0, 1)
        convs = self.conv1, self.conv2, self.conv3, self.conv4
        if not are_plain(convs, (nn.Conv1d,) * 4):
            return self._by_modules(x).unflatten(0, (batch, -1))
        x = F.relu(_each_point(self.norm1, _pointwise(self.conv1, x)))
        x = _pointwise(self.conv2, x)
        # The group's maximum is the same for all of its points: its half of the layer runs once.
        whole, own = self.conv3.weight.squeeze(2).chunk(2, dim=1)
        shared = F.linear(x.max(1).values, whole, self.conv3.bias)
        x = F.linear(x, own) + shared.unsqueeze(1)
        x = _pointwise(self.conv4, F.relu(_each_point(self.norm2, x)))
        return x.max(1).values.unflatten(0, (batch, -1))

    def _by_modules(self, x: Tensor) -> Tensor:
        """The same where somebody watches the convolutions, or has replaced one."""
        x = self.conv2(F.relu(self.norm1(self.conv1(x.transpose(1, 2)))))
        whole = x.max(2, keepdim=True).values.expand_as(x)
        x = self.conv4(F.relu(self.norm2(self.conv3(torch.cat([whole, x], 1)))))
        return x.max(2).values


def _each_point(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm of points (M, S, C)."""
    return norm(x.flatten(0, 1)).view_as(x)


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of width 1 on (..., C)."""
    return F.linear(x, conv.weight.squeeze(2), conv.bias)


class OrderIndicator(nn.Module):
    """Scale and shift of each channel, which tell tokens of one order from those of another
    (section 3.2).

    Shape: (B, L, C) -> the same.
    """

    def __init__(self, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dims) * 0.02 + 1)
        self.bias = nn.Parameter(torch.randn(dims) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@MODELS.register_module()
class PointMamba(FlatBackbone):
    """PointMamba: causal Mamba blocks on the groups of a cloud, in several orders one after the
    other.

    Farthest point sampling chooses G centres, the S nearest points of each are a group, and a small
    PointNet makes a token of it. The released version ('hilbert') has all tokens twice, along a
    Hilbert curve and along one with x and y swapped; the early one ('axes') three times, by x, y
    and z. FPS, neighbours and orders are of plain PyTorch, in fp32 at least, and have no gradient.

    Args:
        arch: a key of ``PointMamba.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth``, ``num_groups`` (G), ``group_size`` (S) and ``order`` ('hilbert' or 'axes'),
            and where it differs from the published ones ``d_state`` (16), ``norm`` ('ln', or 'rms')
            and ``cls_token`` (False), whose token is the last. With ``base``, the name of a
            published one, only the keys that differ from it. The default is 'hilbert_g64'.
        out_indices: blocks to return; the last by default. The outputs share their norm.
        out_type: 'featmap' for (B, C, T), 'raw' for (B, T, C).
        in_channels: of a point: x, y and z, and then others such as normals.
        curve_depth: how Hilbert curves are turned. 'fixed' turns those of all clouds alike; 'cloud'
            by the size of each cloud; 'batch' by that of the largest cloud of the batch, as the
            public code has it: what a cloud gives then depends on the others of its batch. Of
            clouds in the unit sphere all three are nearly always the same.
        drop_rate: dropout. Of 'hilbert' it is of the stream after each block, of 'axes' of the
            tokens before the first.
        drop_path_rate: of 'hilbert' it grows from 0 to that of the last block; of 'axes' all blocks
            but the last have it, as published.
        frozen_stages, norm_eval, with_cp, compile, init_cfg: as of :class:`Backbone`.

    Shape:
        (B, N, in_channels) to a tuple of (B, C, T), T = 2 G or 3 G, and one more with a class
        token. N is at least G and S.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
        UserError: on a cloud of too few points.
    """

    family = FAMILY
    default_arch = 'hilbert_g64'
    stem = ('patch_embed', 'pos_embed', 'order_scales', 'cls_token', 'cls_pos')
    out_types = ('featmap', 'raw')

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, out_type: str = 'featmap', *,
                 curve_depth: str = 'fixed', drop_rate: float = 0.0, **kwargs):
        if curve_depth not in DEPTHS:
            raise ValueError(f'curve_depth={curve_depth!r} does not exist; choose one of {DEPTHS}')
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f'drop_rate must be in [0, 1), got {drop_rate!r}')
        self.curve_depth = curve_depth
        self.drop_rate = drop_rate
        super().__init__(arch, out_indices, out_type, **kwargs)

    @classmethod
    def drop_path_rates(cls, arch: Mapping[str, Any], rate: float) -> list[float]:
        if arch['order'] == 'hilbert':
            return super().drop_path_rates(arch, rate)
        # Each block drops the paths of the one before it there, and nobody those of the last.
        return [rate] * (arch['depth'] - 1) + [0.0]

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        return [1] * arch['depth']  # groups have no grid

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        if in_channels < 3:
            raise ValueError('in_channels must be an int of at least 3, for x, y and z, got '
                             f'{in_channels!r}')
        arch, dims = self.arch, self.arch['embed_dims']
        self.in_channels = in_channels
        self.patch_embed = GroupEmbed(in_channels, dims)
        self.pos_embed = make_pos_embed(dims)
        is_hilbert = arch['order'] == 'hilbert'
        self.order_scales = nn.ModuleList(OrderIndicator(dims) for _ in CURVES) \
            if is_hilbert else None
        for name in ('cls_token', 'cls_pos'):
            self.register_parameter(name, nn.Parameter(
                torch.zeros(1, 1, dims)) if arch.get('cls_token') else None)
        self.drop = nn.Dropout(self.drop_rate) if self.drop_rate else None
        make_norm = RMSNorm if arch.get('norm') == 'rms' else LayerNorm
        self.blocks = make_blocks(dims, drop_path_rates, with_cp, make_norm,
                                  arch.get('d_state', 16))
        self.norm_f = make_norm(dims)
        self.norm = None if is_hilbert else LayerNorm(dims)
        self.apply(init_points)
        for token in (self.cls_token, self.cls_pos):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    # --- groups and their orders --------------------------------------------------------------

    def group(self, points: Tensor) -> Groups:
        """The groups of clouds (B, N, in_channels)."""
        return make_groups(points, self.arch['num_groups'], self.arch['group_size'],
                           self.in_channels)

    def curves(self, centres: Tensor) -> dict[str, Curve]:
        """Each Hilbert curve through centres (B, G, 3), by name."""
        return {name: curve_order(centres, name, GRID_SIZE, self.curve_depth) for name in CURVES}

    def orders(self, centres: Tensor) -> Tensor:
        """The orders (B, K, G) of centres (B, G, 3): the number of the group at each place."""
        if self.arch['order'] == 'axes':
            return centres.detach().argsort(dim=1, stable=True).transpose(1, 2)
        return torch.stack([curve.order for curve in self.curves(centres).values()], 1)

    # --- forward ------------------------------------------------------------------------------

    def embed(self, groups: Groups, orders: Tensor) -> Tensor:
        """The tokens (B, T, C) of groups in their orders, with their positions."""
        tokens = self.patch_embed(groups.points)
        positions = self.pos_embed(groups.centres.to(groups.points.dtype))
        parts = []
        for i in range(ORDERS[self.arch['order']]):
            part = take_points(tokens, orders[:, i])
            if self.order_scales is not None:
                part = self.order_scales[i](part)
            elif self.drop is not None:
                part = self.drop(part)
            parts.append(part + take_points(positions, orders[:, i]))
        if self.cls_token is not None:
            last = (self.cls_token + self.cls_pos).expand(tokens.shape[0], -1, -1)
            parts.append(last.to(tokens.dtype))
        return torch.cat(parts, 1)

    def run(self, tokens: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The stream (B, T, C) after some blocks, before the norms."""
        if self.drop is None or not self.drop.training or self.arch['order'] == 'axes':
            return [residual + hidden for _, (hidden, residual) in
                    run_blocks_to(indices, self.blocks, tokens)]
        streams = []
        for i, block in enumerate(self.blocks[:indices[-1] + 1]):
            hidden, residual = block(tokens)
            tokens = self.drop(residual + hidden)
            if i in indices:
                streams.append(tokens)
        return streams

    def normalize(self, x: Tensor) -> Tensor:
        """The norms of an output, (B, T, C)."""
        x = self.norm_f(x)
        x = x if self.norm is None else self.norm(x)
        return x.to(self.norm_f.weight.dtype)

    def encode(self, points: Tensor) -> Encoded:
        """The outputs with the centres and orders that their tokens are of."""
        groups = self.group(points)
        orders = self.orders(groups.centres)
        streams = self.run(self.embed(groups, orders), self.out_indices)
        return Encoded([self.normalize(x) for x in streams], groups.centres, orders)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encode(x).features)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The stream after some blocks before the norms, each (B, T, C).

        Args:
            x: (B, N, in_channels).
            indices: increasing numbers of blocks; none after the last one runs.
        """
        groups = self.group(x)
        return self.run(self.embed(groups, self.orders(groups.centres)), indices)

    def _adapt_stem(self, weights, ours, checkpoint):
        # Channels after x, y and z are of another kind, and begin without an effect.
        name = 'patch_embed.conv1.weight'
        if name in weights and weights[name].shape[1:] != ours[name].shape[1:]:
            held, wanted = weights[name], ours[name].shape[1]
            weights[name] = F.pad(held[:, :wanted], (0, 0, 0, max(0, wanted - held.shape[1])))

    def output_norm(self, i: int) -> nn.Module | None:
        return self.norm_f if i == len(self.depths) - 1 else None

    def norm_output(self, i: int, x: Tensor) -> Tensor:
        # The outputs share the norms of the last one.
        return self.normalize(x).transpose(1, 2)


def make_pos_embed(dims: int) -> nn.Sequential:
    """The embedding of centres, (..., 3) to (..., C)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dims))


def make_blocks(dims: int, drop_path_rates: Sequence[float], with_cp: bool = False,
                make_norm: type[nn.Module] = LayerNorm, d_state: int = 16) -> nn.ModuleList:
    """Blocks of causal mixers, one for each rate."""
    return nn.ModuleList(
        MambaBlock(MambaMixer(dims, d_state=d_state), make_norm(dims), rate, with_cp)
        for rate in drop_path_rates)


def init_points(module: nn.Module) -> None:
    """Set initial values as published: all linear and convolution weights, those of the mixers
    among them, truncated normal of std 0.02, and biases, that of dt too, 0."""
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_groups(points: Tensor, num_groups: int, group_size: int, channels: int = 3) -> Groups:
    """Groups of neighbours, in the dtype of the points; what is measured is so in fp32 at least.

    Points that are NaN or infinite give tokens that are NaN.

    Args:
        points: (B, N, channels), x, y and z first.
        num_groups, group_size: G and S.
        channels: for the message.

    Raises:
        UserError: on another shape, and on fewer points than G or S.
    """
    if points.dim() != 3 or points.shape[2] != channels:
        raise UserError(f'the model takes clouds (B, N, {channels}), got {tuple(points.shape)}')
    least = max(num_groups, group_size)
    if points.shape[1] < least:
        raise UserError(f'a cloud of {points.shape[1]} points is too small: {num_groups} groups of '
                        f'{group_size} neighbours need at least {least}; sample points repeatedly '
                        'or take an arch of fewer groups')
    xyz = points[..., :3].to(compute_dtype(points.dtype))
    centre_indices, indices = group_points(xyz, num_groups, group_size)
    centres = take_points(xyz, centre_indices)
    relative = (take_points(xyz, indices) - centres.unsqueeze(2)).to(points.dtype)
    if channels > 3:
        relative = torch.cat([relative, take_points(points[..., 3:], indices)], -1)
    return Groups(relative, centres, centre_indices, indices)
