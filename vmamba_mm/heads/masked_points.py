"""The masked pre-training of PointMamba (arXiv 2402.10739, section 3.4)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmamba_mm.families.names import has_row
from vmamba_mm.families.pointmamba import PRETRAIN_KEYS, convert_pretrained
from vmamba_mm.heads.points import PointModel, _build, _need_tokens
from vmamba_mm.layers import LayerNorm, run_blocks
from vmamba_mm.models.pointmamba import Groups, make_blocks, make_pos_embed
from vmamba_mm.ops.points import (
    CURVES,
    chamfer_distance,
    nearest_points,
    take_points,
)
from vmamba_mm.registry import MODELS

MASKS = 'rand', 'block'


class Rebuilt(NamedTuple):
    """What a masked cloud is rebuilt to."""

    points: Tensor  #: (B, M, S, 3), of the masked groups, relative to their centres
    wanted: Tensor  #: (B, M, S, 3), what they were
    centres: Tensor  #: (B, M, 3)
    visible: Tensor  #: (B, G - M, C), the encoder's tokens
    mask: Tensor  #: (B, G), in the order in which the encoder sees the groups


class PointDecoder(nn.Module):
    """A few blocks that rebuild the masked groups.

    Args:
        order: of the backbone. The early version ('axes') puts masked tokens behind the visible
            ones, and has a norm more.
        dims: C.
        group_size: S.
        drop_path_rates: of each block.
        make_norm: the class of the norms.
    """

    def __init__(self, order: str, dims: int, group_size: int, drop_path_rates: Sequence[float],
                 make_norm: type[nn.Module] = LayerNorm):
        super().__init__()
        self.order = order
        self.pos_embed = make_pos_embed(dims)
        self.blocks = make_blocks(dims, drop_path_rates, make_norm=make_norm)
        self.norm_f = make_norm(dims)
        self.norm = LayerNorm(dims) if order == 'axes' else None
        self.points = nn.Conv1d(dims, 3 * group_size, 1)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, visible: Tensor, mask_token: Tensor, centres: Tensor, is_visible: Tensor,
                is_masked: Tensor) -> Tensor:
        """
        Args:
            visible: (B, V, C).
            mask_token: (1, 1, C).
            centres: (B, G, 3).
            is_visible, is_masked: (B, V) and (B, M), numbers of groups in increasing order.

        Returns:
            (B, M, S, 3), of the masked groups.
        """
        masked = mask_token.expand(len(visible), is_masked.shape[1], -1).to(visible.dtype)
        numbers = torch.cat([is_visible, is_masked], 1)
        x = torch.cat([visible, masked], 1)
        x = x + self.pos_embed(take_points(centres, numbers).to(mask_token.dtype))
        if self.order == 'hilbert':  # each at the place of its group
            x = take_points(x, numbers.argsort(1))
        hidden, residual = run_blocks(self.blocks, x)
        x = self.norm_f(residual + hidden)
        x = take_points(x, is_masked) if self.order == 'hilbert' else x[:, visible.shape[1]:]
        x = x if self.norm is None else self.norm(x)
        x = x.to(self.points.weight.dtype)
        points = nn.functional.linear(x, self.points.weight.squeeze(2), self.points.bias)
        return points.unflatten(2, (-1, 3))


@MODELS.register_module()
class MaskedPointMamba(PointModel):
    """Masked pre-training: most groups of a cloud are taken away, and rebuilt from the others.

    A backbone of 'hilbert' sees the groups along one of the two curves, which is drawn for each
    batch; one of 'axes' in the order in which they were chosen. The loss is the Chamfer distance of
    the masked groups. Files of the public code load by ``load_state_dict`` under their names.

    Args:
        backbone: a :class:`vmamba_mm.models.PointMamba` with ``out_type='raw'``.
        decoder_depth: blocks of the decoder.
        decoder_drop_path_rate: of 'hilbert' it grows to that of the last block; of 'axes' all but
            the last have it.
        mask_ratio: of the groups.
        mask_type: 'rand' masks any groups, 'block' those next to one.
        loss: 'cdl2' (published) or 'cdl1', see :func:`vmamba_mm.ops.points.chamfer_distance`.
        data_preprocessor, init_cfg: as of :class:`vmamba_mm.heads.PointClassifier`.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    def __init__(self, backbone: dict | nn.Module, decoder_depth: int = 4,
                 decoder_drop_path_rate: float = 0.0, mask_ratio: float = 0.6,
                 mask_type: str = 'rand', loss: str = 'cdl2',
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        super().__init__(data_preprocessor, init_cfg)
        if mask_type not in MASKS:
            raise ValueError(f'mask_type={mask_type!r} does not exist; choose one of {MASKS}')
        if loss not in ('cdl1', 'cdl2'):
            raise ValueError(f"loss={loss!r} does not exist; choose 'cdl1' or 'cdl2'")
        self.backbone = _build(backbone)
        _need_tokens(self.backbone, type(self).__name__)
        arch = self.backbone.arch
        if not 0 < int(mask_ratio * arch['num_groups']) < arch['num_groups']:
            raise ValueError(f'mask_ratio must leave and take some of {arch["num_groups"]} groups, '
                             f'got {mask_ratio!r}')
        if arch.get('cls_token'):
            raise ValueError('there is no masked pre-training with a class token')
        self.mask_ratio, self.mask_type, self.loss_name = mask_ratio, mask_type, loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, arch['embed_dims']))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        rates = self.backbone.drop_path_rates(dict(arch, depth=decoder_depth),
                                              decoder_drop_path_rate)
        self.decoder = PointDecoder(arch['order'], arch['embed_dims'], arch['group_size'], rates,
                                    type(self.backbone.norm_f))
        self.register_load_state_dict_pre_hook(_take_official_names)

    def draw_mask(self, centres: Tensor) -> Tensor:
        """Which of the groups (B, G, 3) are taken away: (B, G)."""
        batch, count, _ = centres.shape
        if self.mask_type == 'block':
            first = torch.randint(count, (batch, 1), device=centres.device)
            first = take_points(centres, first)
            chosen = nearest_points(centres, first, int(self.mask_ratio * count)).squeeze(1)
        else:
            chosen = torch.rand(batch, count, device=centres.device).argsort(1)
            chosen = chosen[:, :int(self.mask_ratio * count)]
        return torch.zeros(batch, count, dtype=torch.bool, device=centres.device).scatter(
            1, chosen, True)

    def rebuild(self, points: Tensor, mask: Tensor | None = None, order_index: int | None = None
                ) -> Rebuilt:
        """Mask clouds and rebuild them.

        Args:
            points: (B, N, 3).
            mask: (B, G), True for what is taken away, as many of each cloud; None to draw one.
            order_index: of 'hilbert', which of the curves; None to draw one for the batch.
        """
        backbone = self.backbone
        groups = backbone.group(points)
        is_hilbert = backbone.arch['order'] == 'hilbert'
        if is_hilbert:
            if order_index is None:
                order_index = int(torch.randint(len(CURVES), ()))
            groups = _along(list(backbone.curves(groups.centres).values())[order_index].order,
                            groups)
        if mask is None:
            mask = self.draw_mask(groups.centres)
        num_masked = int(mask[0].sum())
        by_mask = mask.long().argsort(dim=1, stable=True)
        is_visible, is_masked = by_mask.tensor_split([mask.shape[1] - num_masked], 1)
        tokens = backbone.patch_embed(groups.points)
        if is_hilbert:
            # All of them are read, so that each parameter has a gradient on every process.
            scales = backbone.order_scales
            weight, bias = (torch.stack([getattr(s, name) for s in scales])[order_index]
                            for name in ('weight', 'bias'))
            tokens = tokens * weight + bias
        visible = take_points(tokens, is_visible)
        centres = take_points(groups.centres, is_visible)
        visible = visible + backbone.pos_embed(centres.to(groups.points.dtype))
        visible = backbone.normalize(backbone.run(visible, [len(backbone.blocks) - 1])[0])
        rebuilt = self.decoder(visible, self.mask_token, groups.centres, is_visible, is_masked)
        flat = groups.points[..., :3].flatten(2)
        wanted = take_points(flat, is_masked).unflatten(2, (-1, 3))
        return Rebuilt(rebuilt, wanted, take_points(groups.centres, is_masked), visible, mask)

    def distance(self, rebuilt: Rebuilt) -> Tensor:
        """The loss."""
        return chamfer_distance(rebuilt.points.flatten(0, 1), rebuilt.wanted.flatten(0, 1),
                                self.loss_name)

    def tensor(self, inputs: Tensor, data_samples: Sequence | None = None) -> Rebuilt:
        return self.rebuild(inputs)

    def losses(self, inputs: Tensor, data_samples: Sequence | None = None) -> dict[str, Tensor]:
        return dict(loss=self.distance(self.rebuild(inputs)))

    def fill(self, inputs: Tensor, samples: Sequence) -> None:
        """Give each sample its masked points as they were, ``masked_points``, and as they were
        rebuilt, ``pred_points``, each (M S, 3)."""
        rebuilt = self.rebuild(inputs)
        centres = rebuilt.centres.unsqueeze(2)
        for name, groups in dict(pred_points=rebuilt.points, masked_points=rebuilt.wanted).items():
            for sample, points in zip(samples, (groups + centres).flatten(1, 2), strict=True):
                sample.set_field(points, name)


def _along(order: Tensor, groups: Groups) -> Groups:
    """The groups in another order."""
    points = take_points(groups.points.flatten(2), order).view_as(groups.points)
    return Groups(points, take_points(groups.centres, order),
                  groups.centre_indices.gather(1, order), take_points(groups.indices, order))


def _take_official_names(module, state_dict: Mapping[str, Tensor], prefix, *args):
    """Rename the weights of the public code in a state dict that is about to be loaded."""
    below = {k[len(prefix):]: k for k in state_dict if k.startswith(prefix)}
    if any(name.startswith('MAE_encoder.') for name in below):
        renamed = {}
        for name, key in below.items():
            value = state_dict.pop(key)
            ours = next(iter(convert_pretrained({name: value}))) \
                if has_row(name, PRETRAIN_KEYS) else name
            renamed[prefix + ours] = value
        state_dict.update(renamed)
