"""Losses that mmseg has not."""

import torch
from torch import Tensor, nn

from vmamba_mm.registry import MODELS


@MODELS.register_module()
class BatchDiceLoss(nn.Module):
    """RS-Mamba's Dice loss, for mmseg's heads of one logit, over all pixels of a batch.

    It is 1 - (2 sum p t + s) / (sum p + sum t + s) with p = sigmoid(logit) and t the labels.
    mmseg's ``DiceLoss`` is the mean of that over images.

    Args:
        smooth: s.
        loss_weight: factor of the result.
        loss_name: by which mmseg logs it.
    """

    def __init__(self, smooth: float = 1e-5, loss_weight: float = 1.0,
                 loss_name: str = 'loss_dice'):
        super().__init__()
        self.smooth = smooth
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None,
                ignore_index: int = 255, **kwargs) -> Tensor:
        """Logits (B, 1, H, W) and labels (B, H, W) of 0 and 1; those of ``ignore_index`` do not
        count, nor do pixels of weight 0. A scalar in fp32."""
        if pred.dim() != 4 or pred.shape[1] != 1:
            raise ValueError(f'BatchDiceLoss takes logits (B, 1, H, W), got {tuple(pred.shape)}; '
                             'set num_classes=2, out_channels=1 of the head')
        counts = (target != ignore_index).float()
        if weight is not None:
            counts = counts * weight
        p = pred.squeeze(1).float().sigmoid() * counts
        t = torch.where(target == ignore_index, 0, target).float() * counts
        score = (2 * (p * t).sum() + self.smooth) / (p.sum() + t.sum() + self.smooth)
        return self.loss_weight * (1 - score)
