"""What heads of mmpretrain's ``ImageClassifier`` share that give logits of their own making."""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.registry import MODELS


class LogitsHead(BaseModule):
    """A head whose ``forward`` gives logits (B, classes), for mmpretrain, which it does not import.

    Args:
        loss: config of one of mmpretrain's losses; None for torch's cross entropy.
        init_cfg: mmengine's.
    """

    def __init__(self, loss: dict | None, init_cfg: dict | list[dict] | None):
        super().__init__(init_cfg)
        self.loss_module = nn.CrossEntropyLoss() if loss is None else MODELS.build(loss)

    def predict(self, feats, data_samples: list | None = None) -> list:
        """DataSamples with ``pred_score`` (classes) and ``pred_label``; ``data_samples``, if there
        are any."""
        from mmpretrain.structures import DataSample

        scores = self(feats).softmax(1)
        samples = [DataSample() for _ in scores] if data_samples is None else data_samples
        return [sample.set_pred_score(score).set_pred_label(score.argmax(keepdim=True).detach())
                for sample, score in zip(samples, scores, strict=True)]


def targets_of(data_samples: list) -> Tensor:
    """The labels (B) of mmpretrain's DataSamples; of mixed images their scores (B, classes)."""
    if 'gt_score' in data_samples[0]:
        return torch.stack([sample.gt_score for sample in data_samples])
    return torch.cat([sample.gt_label for sample in data_samples])
