"""Losses of segmentors that mmseg has not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.registry import MODELS


@MODELS.register_module()
class DiceLoss(nn.Module):
    """1 - Dice, for a head of mmseg with one logit or one for each class.

    mmseg's own compares one logit with the mask of the background. Here one logit goes through a
    sigmoid and is compared with class 1, several through a softmax, each with its class. Dice is
    2 sum(p t) / (sum p + sum t), of each image and class or of each class in the batch, averaged.
    VM-UNet (arXiv 2402.02491) has the first for two classes and the second for many, RS-Mamba
    (arXiv 2404.02668) the second for two.

    Args:
        per_image: sums over the pixels of an image; False for those of the batch.
        squared: whether the sums in the denominator are of squares (V-Net, arXiv 1606.04797).
        smooth: added to numerator and denominator.
        loss_weight: a factor.
        loss_name: in the log; to be added to the loss it must begin with ``loss_``.
    """

    def __init__(self, per_image: bool = True, squared: bool = False, smooth: float = 1.0,
                 loss_weight: float = 1.0, loss_name: str = 'loss_dice'):
        super().__init__()
        self.per_image, self.squared = per_image, squared
        self.smooth, self.loss_weight, self.loss_name = smooth, loss_weight, loss_name

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None,
                ignore_index: int = 255, **kwargs) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (B, C, H, W).
            target: (B, H, W) of class numbers.
            weight: (B, H, W), of pixels; None for 1.
            ignore_index: pixels of this number count nowhere.
        """
        classes = logits.shape[1]
        counts = (target != ignore_index)[:, None].to(torch.float32)
        if weight is not None:
            counts = counts * weight[:, None]
        if classes == 1:
            p, t = logits.float().sigmoid(), (target == 1)[:, None].float()
        else:
            p = logits.float().softmax(1)
            held = target.where((target >= 0) & (target < classes), classes)
            t = F.one_hot(held.long(), classes + 1)[..., :classes].permute(0, 3, 1, 2).float()
        over = (2, 3) if self.per_image else (0, 2, 3)
        sums = [(values * counts).sum(over) for values in (
            p * t, p * p if self.squared else p, t)]
        dice = (2 * sums[0] + self.smooth) / (sums[1] + sums[2] + self.smooth)
        return self.loss_weight * (1 - dice).mean()
