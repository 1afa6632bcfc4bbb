"""What VideoMamba (arXiv 2403.06977) is trained with besides labels: a smaller model's features,
those of CLIP, and text.

The modules hold a :class:`vmamba_mm.models.VideoMamba` as ``backbone``, and official files load
into them by :func:`vmamba_mm.checkpoints.files.read_checkpoint`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.heads.taught import TaughtClassifier
from vmamba_mm.models.base import init_linear
from vmamba_mm.registry import MODELS

_POOLS = ('cls', 'avg', 'cls+avg', 'cls_cat_avg')


class DistilledVideoMamba(nn.Module):
    """A classifier that also gives the features of self-distillation (section 3.3).

    A smaller, trained VideoMamba is the teacher, and the mean of 2 - 2 cos between its features
    and the student's, over all tokens of the same mixed images, is added to the loss of the
    labels (weight 1 in the published recipe).

    Args:
        backbone: a VideoMamba with ``out_type='raw'``.
        num_classes: of the classifier.
        feature_dims: channels of the teacher's features, which a norm and a linear layer bring the
            student's to; None for a teacher, whose features are its own tokens.

    Shape:
        what the backbone takes, to logits (B, num_classes) and features (B, L, feature_dims), of
        length 1, the class token first.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, feature_dims: int | None = None):
        super().__init__()
        self.backbone = backbone
        dims = backbone.num_features[-1]
        self.head = nn.ModuleDict(dict(fc=nn.Linear(dims, num_classes)))
        self.distill_head = None if feature_dims is None else _distill_head(backbone, feature_dims)
        init_linear(self.head['fc'])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone(x)[-1]
        features = tokens if self.distill_head is None else self.distill_head(tokens)
        return self.head['fc'](tokens[:, 0]), F.normalize(features, dim=-1)


def _distill_head(backbone, feature_dims):
    dims = backbone.num_features[-1]
    head = nn.Sequential(type(backbone.norm)(dims), nn.Linear(dims, feature_dims))
    return head.apply(init_linear)


@MODELS.register_module()
class SelfDistillation(TaughtClassifier):
    """A classifier of mmpretrain's kind that learns from labels and from a smaller model.

    For training; its backbone and head are those of the plain classifier. The published recipe of
    middle and base on ImageNet-1K (section 3.3): see :class:`DistilledVideoMamba`, whose names the
    parameters have.

    Args:
        backbone: config of a VideoMamba with ``out_type='raw'``.
        head: a classification head of mmpretrain, of class tokens.
        teacher: config of a VideoMamba with ``out_type='raw'`` and trained weights (``init_cfg``).
            It is not trained, and is in no state dict.
        weight: of the loss of features.
        neck: None: a class token needs none.
        train_cfg: ``augments`` and ``probs`` of mmpretrain's RandomBatchAugment: Mixup, CutMix. The
            teacher sees the same mixed images.
        data_preprocessor: config of mmpretrain's ClsDataPreprocessor, its type by default.
        init_cfg: mmengine's.
    """

    def __init__(self, backbone: dict, head: dict, teacher: dict, weight: float = 1.0,
                 neck: None = None, train_cfg: dict | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        if neck is not None:
            raise ValueError(f'SelfDistillation has class tokens, which need no neck, got {neck!r}')
        super().__init__(backbone, head, teacher, train_cfg, data_preprocessor, init_cfg)
        for name, model in dict(backbone=self.backbone, teacher=self.teacher).items():
            if model.out_type != 'raw':
                raise ValueError(f"the {name} of SelfDistillation needs out_type='raw', got "
                                 f'{model.out_type!r}')
        self.distill_head = _distill_head(self.backbone, self.teacher.num_features[-1])
        self.weight = weight

    def read(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The class tokens (B, C)."""
        return outs[-1][:, 0],

    def losses(self, outs: tuple[Tensor, ...], wanted: tuple[Tensor, ...], data_samples: list
               ) -> dict[str, Tensor]:
        """Those of the labels, and the mean of 2 - 2 cos between the tokens of both."""
        likeness = F.cosine_similarity(self.distill_head(outs[-1]), wanted[-1], dim=-1).mean()
        return self.head.loss(self.read(outs), data_samples) | dict(
            loss_features=self.weight * (2 - 2 * likeness))


class MaskedVideoMamba(nn.Module):
    """Masked pre-training: features of the visible tokens, to be aligned with those of CLIP
    (section 3.4).

    The published setting takes one feature, which is the residual stream *before* the last block's
    result, without a norm: the last block and the backbone's norm then get no gradient. Features
    of earlier blocks, if there are more than one, are the stream after the block, through the norm.

    Args:
        backbone: a VideoMamba with the order 'spatial-first'.
        feature_dims: channels of CLIP's features.
        num_features: how many blocks give a feature: the last, and each ``interval`` before it.
        interval: blocks between two of them.
        normalize: whether features have the length 1.
        add_last: add the last block's result to the last feature, as the published code does where
            it does not fuse addition and norm.

    Shape:
        clips (B, 3, T, H, W) and a mask (B, 1 + T'H'W'), True for what is removed, as many tokens
        of each clip, and False for the class token at 0; to (num_features, B, visible tokens,
        feature_dims), earlier blocks first.
    """

    def __init__(self, backbone: nn.Module, feature_dims: int = 512, num_features: int = 1,
                 interval: int = 1, normalize: bool = True, add_last: bool = False):
        super().__init__()
        depth = len(backbone.blocks)
        if not 1 <= num_features or (num_features - 1) * interval >= depth:
            raise ValueError(f'num_features={num_features} with interval={interval} asks for more '
                             f'blocks than the {depth} of the backbone')
        if any(backbone.is_temporal_first):
            raise ValueError("masked tokens need order='spatial-first' of the backbone's arch, got "
                             f'{backbone.arch["order"]!r}')
        self.backbone = backbone
        self.out_blocks = [depth - 1 - i * interval for i in range(num_features)]
        self.normalize, self.add_last = normalize, add_last
        self.clip_decoder = nn.ModuleList(
            ClipDecoder(backbone.num_features[-1], feature_dims) for _ in range(num_features))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _, features = self._encode(x, mask)
        return self._decode(features, mask)

    def _encode(self, x, mask):
        """The last block's hidden and residual, and the streams that features are made of."""
        backbone = self.backbone
        tokens, patches = backbone.embed(x)
        if mask is not None:
            tokens, patches = _visible(tokens, mask), None
        features, last = [], len(backbone.blocks) - 1
        for i, hidden, residual in backbone.run_blocks(tokens, patches,
                                                       sorted({*self.out_blocks, last})):
            if i < last:
                features.append(backbone.norm(residual + hidden))
        features.append(residual + hidden if self.add_last else residual)
        return (hidden, residual), features

    def _decode(self, features, mask):
        positions = _visible(sinusoids(mask.shape[1], features[-1].shape[-1]).to(
            features[-1]).expand(len(mask), -1, -1), mask)
        outs = torch.stack([decoder(y + positions) for decoder, y in
                            zip(self.clip_decoder, features, strict=True)])
        return F.normalize(outs, dim=-1) if self.normalize else outs


class VideoEncoder(MaskedVideoMamba):
    """The vision encoder of VideoMamba's video-text models (section 3.4).

    Args:
        backbone, feature_dims, num_features, interval, add_last: as of :class:`MaskedVideoMamba`;
            features are not normalised.
        pool: what stands for a clip: the class token ('cls'), the mean of the others ('avg'), the
            sum of both ('cls+avg', published) or one after the other ('cls_cat_avg').

    Args of ``forward``:
        x: clips (B, 3, T, H, W), or images (B, 3, H, W) for a backbone of clips.
        mask: as of :class:`MaskedVideoMamba`, or None.
        keep_temporal: average each frame by itself (without a mask).

    Returns:
        The tokens (B, L, C) without the class token, a clip (B, 1, C) through a norm of its own,
        (B, T', C) with ``keep_temporal``, (B, 2, C) of 'cls_cat_avg'; and with a mask the
        features.
    """

    def __init__(self, backbone: nn.Module, feature_dims: int = 512, num_features: int = 1,
                 interval: int = 1, add_last: bool = False, pool: str = 'cls+avg'):
        if pool not in _POOLS:
            raise ValueError(f'pool={pool!r} does not exist; choose one of {_POOLS}')
        super().__init__(backbone, feature_dims, num_features, interval, False, add_last)
        self.pool = pool
        self.pool_norm = nn.LayerNorm(backbone.num_features[-1])

    def forward(self, x: Tensor, mask: Tensor | None = None, keep_temporal: bool = False
                ) -> tuple[Tensor, ...]:
        (hidden, residual), features = self._encode(x, mask)
        backbone = self.backbone
        tokens = backbone.add_and_norm(len(backbone.blocks) - 1, hidden, residual)
        first, rest = tokens[:, :1], tokens[:, 1:]
        outs = rest, self.pool_norm(self._pool(first, rest, x, keep_temporal))
        return outs if mask is None else (*outs, self._decode(features, mask))

    def _pool(self, first, rest, x, keep_temporal):
        if self.pool == 'cls':
            return first
        frames = 1
        if keep_temporal and x.dim() == 5:
            frames = x.shape[2] // self.backbone.arch['tubelet_size']
        mean = rest.unflatten(1, (frames, -1)).mean(2)
        if self.pool == 'cls_cat_avg':
            return torch.cat([first, mean], dim=1)
        return first + mean if self.pool == 'cls+avg' else mean


class ClipDecoder(nn.Module):
    """Linear and norm: (..., C) to (..., feature_dims)."""

    def __init__(self, embed_dims: int, feature_dims: int):
        super().__init__()
        self.head = nn.Linear(embed_dims, feature_dims)
        self.norm = nn.LayerNorm(feature_dims)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The residual stream is fp32 in a model of halves too.
        return self.norm(self.head(x.to(self.head.weight.dtype)))


def sinusoids(length: int, dims: int) -> Tensor:
    """Fixed position embeddings (length, dims) of arXiv 1706.03762, section 3.5, in fp32."""
    channels = torch.arange(dims, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] \
        / 10000 ** (2 * (channels // 2) / dims)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()


def _visible(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, L, C) without the masked ones, of which each sample has as many."""
    return tokens[~mask].reshape(len(tokens), -1, tokens.shape[-1])
