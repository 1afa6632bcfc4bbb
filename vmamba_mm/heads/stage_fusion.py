"""The head of EfficientViM's classifiers (arXiv 2411.15241)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.heads.logits import LogitsHead, targets_of
from vmamba_mm.registry import MODELS


@MODELS.register_module()
class StageFusionHead(LogitsHead):
    """A linear layer for each of several features, whose logits are added with learned weights.

    "Multi-stage hidden state fusion" of the paper: the features are the states of each stage and
    the last map, as ``EfficientViM(with_states=True)`` gives them, and the softmax of ``weights``
    says how much each of them counts.

    A distilled classifier has a second set of these layers, which learns what a teacher says, and
    its logits are the mean of both. :class:`vmamba_mm.heads.HardDistillation` trains it.

    Args:
        num_classes: of every layer.
        in_channels: of each feature.
        distilled: whether there is the second set, ``fc_dist`` and ``weights_dist``.
        alpha: with it, the part of the teacher in the loss.
        loss: config of one of mmpretrain's losses, of labels; None for torch's cross entropy.
        init_cfg: mmengine's.

    Raises:
        ValueError: if a number of classes or channels is below 1, or ``alpha`` outside [0, 1].
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], distilled: bool = False,
                 alpha: float = 0.5, loss: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(loss, init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02))
        if not isinstance(in_channels, Sequence) or min(num_classes, *in_channels, 1) < 1:
            raise ValueError('num_classes must be at least 1, and in_channels a list of channels '
                             f'of at least 1, got {num_classes!r} and {in_channels!r}')
        if not 0 <= alpha <= 1:
            raise ValueError(f'alpha must be from 0 to 1, got {alpha!r}')
        self.fc, self.weights = _layers(in_channels, num_classes)
        self.distilled, self.alpha = distilled, alpha
        if distilled:
            self.fc_dist, self.weights_dist = _layers(in_channels, num_classes)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Features (B, C_i, ...), of which the mean of all positions counts, to logits
        (B, classes)."""
        sets = self._logits(feats)
        return sets[0] if len(sets) == 1 else (sets[0] + sets[1]) / 2

    def loss(self, feats: Sequence[Tensor], data_samples: list, teacher: Tensor | None = None,
             **kwargs) -> dict[str, Tensor]:
        """``loss`` and, of a distilled classifier, ``loss_teacher``, with their weights.

        Args:
            feats: as of :meth:`forward`.
            data_samples: mmpretrain's DataSamples with labels, or scores where images were mixed.
            teacher: its logits (B, classes), of which the largest is the label of the second set
                ("hard" distillation, section 4 of DeiT, arXiv 2012.12877).

        Raises:
            ValueError: if a distilled classifier is given none, or another one is.
        """
        if self.distilled != (teacher is not None):
            raise ValueError('a StageFusionHead with distilled=True learns from a teacher, and no '
                             'other one does: it is the head of HardDistillation, in place of '
                             f'ImageClassifier; it has distilled={self.distilled}')
        logits, *others = self._logits(feats)
        loss = self.loss_module(logits, targets_of(data_samples), **kwargs)
        if not others:
            return dict(loss=loss)
        loss_teacher = F.cross_entropy(others[0], teacher.argmax(1))
        return dict(loss=(1 - self.alpha) * loss, loss_teacher=self.alpha * loss_teacher)

    def _logits(self, feats):
        """(B, classes), of the labels' set and that of the teacher."""
        means = [y.flatten(2).mean(2) for y in feats]
        sets = [(self.fc, self.weights)]
        if self.distilled:
            sets.append((self.fc_dist, self.weights_dist))
        return [sum(weight * fc(y) for weight, fc, y in zip(
            weights.softmax(0), layers, means, strict=True)) for layers, weights in sets]


def _layers(in_channels, num_classes):
    layers = nn.ModuleList(nn.Linear(channels, num_classes) for channels in in_channels)
    return layers, nn.Parameter(torch.ones(len(layers)))
