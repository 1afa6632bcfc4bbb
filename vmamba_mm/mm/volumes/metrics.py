"""Dice and the 95th percentile of the Hausdorff distance of volumes, case by case."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from vmamba_mm.mm.compat import require
from vmamba_mm.registry import METRICS


@METRICS.register_module()
class VolumeDice(BaseMetric):
    """Dice and HD95 of regions, the mean of all cases.

    Args:
        regions: by name, the classes that belong to each, such as ``dict(WT=[1, 2, 3])``; they may
            overlap.
        with_hd95: whether to measure HD95, in units of ``spacing``, by MONAI.
        spacing: of voxels, in mm, after the pipeline.
        one_empty: Dice and HD95 where a region is empty in the prediction alone or in the mask
            alone.
        both_empty: where it is in both.

    A sample has ``pred``, (D, H, W), and ``label``, (1, D, H, W).
    Results: ``dice``, the mean of the regions, ``dice_NAME`` of each, from 0 to 1, and ``hd95`` and
    ``hd95_NAME``.

    Raises:
        ValueError: if there is no region.
    """

    def __init__(self, regions: Mapping[str, Sequence[int]], with_hd95: bool = False,
                 spacing: Sequence[float] = (1.0, 1.0, 1.0),
                 one_empty: tuple[float, float] = (0.0, 50.0),
                 both_empty: tuple[float, float] = (1.0, 0.0), collect_device: str = 'cpu',
                 prefix: str | None = None):
        if not regions:
            raise ValueError('regions must name at least one, such as dict(tumour=[1])')
        super().__init__(collect_device, prefix)
        if with_hd95:
            require('monai')
        self.regions, self.with_hd95 = dict(regions), with_hd95
        self.spacing, self.one_empty, self.both_empty = spacing, one_empty, both_empty

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            pred, label = sample['pred'], sample['label'][0].to(sample['pred'].device)
            self.results.append({name: self._measure(pred, label, classes)
                                 for name, classes in self.regions.items()})

    def _measure(self, pred, label, classes) -> tuple[float, float]:
        classes = torch.as_tensor(classes, device=pred.device)
        pred, label = torch.isin(pred, classes), torch.isin(label, classes)
        if not pred.any() or not label.any():
            return tuple(self.one_empty if pred.any() or label.any() else self.both_empty)
        dice = 2 * (pred & label).sum() / (pred.sum() + label.sum())
        return dice.item(), self._hd95(pred, label) if self.with_hd95 else 0.0

    def _hd95(self, pred: Tensor, label: Tensor) -> float:
        from monai.metrics import compute_hausdorff_distance

        return compute_hausdorff_distance(
            pred[None, None], label[None, None], include_background=True, percentile=95,
            spacing=list(self.spacing)).item()

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        metrics = {}
        for i, name in enumerate(('dice', 'hd95') if self.with_hd95 else ('dice',)):
            means = {region: sum(case[region][i] for case in results) / len(results)
                     for region in self.regions}
            metrics[name] = sum(means.values()) / len(means)
            metrics.update({f'{name}_{region}': mean for region, mean in means.items()})
        return metrics
