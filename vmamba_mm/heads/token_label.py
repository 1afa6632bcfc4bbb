"""The head of classifiers that were trained with token labelling (arXiv 2104.10858)."""

from collections.abc import Sequence

from torch import Tensor, nn

from vmamba_mm.heads.logits import LogitsHead, targets_of
from vmamba_mm.registry import MODELS


@MODELS.register_module()
class TokenLabelHead(LogitsHead):
    """A head for mmpretrain's ``ImageClassifier`` with two linear layers: ``fc`` of the mean of the
    last map, and ``aux`` of each position of the first one.

    As LV-ViT and RMT have it: a test adds ``aux_weight`` times the largest logits of all positions,
    for each class, to those of ``fc``. In training each layer has a loss of its own. A position has
    the label of its image: maps of labels, which another network makes of the images, are not read,
    and pictures are not mixed token by token.

    Args:
        num_classes: of both layers.
        in_channels: of the last map.
        aux_channels: of the first map.
        aux_weight: of the second layer, in a test and of its loss.
        loss: config of one of mmpretrain's losses; None for torch's cross entropy.
        init_cfg: mmengine's.

    Raises:
        ValueError: if a number of classes or channels is below 1.
    """

    def __init__(self, num_classes: int, in_channels: int, aux_channels: int,
                 aux_weight: float = 0.5, loss: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(loss, init_cfg or dict(type='Normal', layer='Linear', std=0.01))
        if min(num_classes, in_channels, aux_channels) < 1:
            raise ValueError('num_classes, in_channels and aux_channels must be at least 1, got '
                             f'{num_classes!r}, {in_channels!r} and {aux_channels!r}')
        self.fc = nn.Linear(in_channels, num_classes)
        self.aux = nn.Linear(aux_channels, num_classes)
        self.aux_weight = aux_weight

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """The first and the last map, (B, C_i, H_i, W_i) each, to logits (B, classes)."""
        logits, of_positions = self._logits(feats)
        return logits + self.aux_weight * of_positions.amax(1)

    def loss(self, feats: Sequence[Tensor], data_samples: list, **kwargs) -> dict[str, Tensor]:
        """``loss`` and, with its weight, ``aux_loss``.

        Args:
            feats: as of :meth:`forward`.
            data_samples: mmpretrain's DataSamples with labels, or scores where images were mixed.
        """
        logits, of_positions = self._logits(feats)
        target = targets_of(data_samples)
        repeated = target.repeat_interleave(of_positions.shape[1], dim=0)
        aux_loss = self.loss_module(of_positions.flatten(0, 1), repeated, **kwargs)
        return dict(loss=self.loss_module(logits, target, **kwargs),
                    aux_loss=self.aux_weight * aux_loss)

    def _logits(self, feats):
        """(B, classes), and of the positions of the first map, (B, H W, classes)."""
        return self.fc(feats[-1].mean((2, 3))), self.aux(feats[0].flatten(2).transpose(1, 2))
