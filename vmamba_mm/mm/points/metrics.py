"""Accuracy of classes, IoU of parts and the distance of rebuilt clouds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric

from vmamba_mm.ops.points import chamfer_distance
from vmamba_mm.registry import METRICS

#: Of ShapeNetPart: how many parts each category has, in the order of both.
SHAPENET_PARTS = dict(
    Airplane=4, Bag=2, Cap=2, Car=4, Chair=4, Earphone=3, Guitar=3, Knife=2, Lamp=4, Laptop=2,
    Motorbike=6, Mug=2, Pistol=3, Rocket=3, Skateboard=3, Table=3)


def part_ranges(parts: Mapping[str, int]) -> dict[str, range]:
    """The numbers of the parts of each category, of how many there are."""
    ends = np.cumsum(list(parts.values())).tolist()
    return {name: range(end - parts[name], end) for name, end in zip(parts, ends, strict=True)}


@METRICS.register_module()
class PointAccuracy(BaseMetric):
    """Accuracy of clouds, in percent: ``accuracy`` of all (OA) and ``class_accuracy``, the mean
    over the classes that there are (mAcc)."""

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.results += [(int(s['gt_label']), int(s['pred_label'])) for s in data_samples]

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        right: dict[int, list[bool]] = {}
        for label, pred in results:
            right.setdefault(label, []).append(label == pred)
        return dict(accuracy=100 * float(np.mean([pred == label for label, pred in results])),
                    class_accuracy=100 * float(np.mean([np.mean(r) for r in right.values()])))


@METRICS.register_module()
class PartIoU(BaseMetric):
    """IoU of the parts of objects, in percent, by the rule of ShapeNetPart.

    Of each point the most likely part among those of the object's category counts. The IoU of an
    object is the mean over the parts of its category, of which one that is neither there nor
    predicted counts 1. ``instance_miou`` is the mean of all objects, ``class_miou`` that of the
    means of each category, ``iou_NAME``; ``accuracy`` is of points.

    Args:
        parts: of each category, how many there are; those of ShapeNetPart by default.
    """

    def __init__(self, parts: dict[str, int] | None = None, collect_device: str = 'cpu',
                 prefix: str | None = None):
        super().__init__(collect_device, prefix)
        self.parts = dict(parts or SHAPENET_PARTS)
        self.ranges = list(part_ranges(self.parts).values())

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            category, wanted = int(sample['category']), sample['gt_parts'].cpu()
            own = self.ranges[category]
            pred = sample['pred_scores'][:, own.start:own.stop].argmax(1).cpu() + own.start
            ious = []
            for part in own:
                both = ((pred == part) & (wanted == part)).sum().item()
                either = ((pred == part) | (wanted == part)).sum().item()
                ious.append(both / either if either else 1.0)
            self.results.append((category, float(np.mean(ious)),
                                 (pred == wanted).sum().item(), len(wanted)))

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        by_category: dict[int, list[float]] = {}
        for category, iou, _, _ in results:
            by_category.setdefault(category, []).append(iou)
        means = {category: float(np.mean(ious)) for category, ious in sorted(by_category.items())}
        names = list(self.parts)
        metrics = dict(instance_miou=np.mean([r[1] for r in results]),
                       class_miou=np.mean(list(means.values())),
                       accuracy=sum(r[2] for r in results) / sum(r[3] for r in results))
        metrics |= {f'iou_{names[category]}': mean for category, mean in means.items()}
        return {name: 100 * float(value) for name, value in metrics.items()}


@METRICS.register_module()
class RebuiltDistance(BaseMetric):
    """The mean Chamfer distance of masked points to how they were rebuilt, ``cdl1`` and ``cdl2``,
    each times 1000. The masks are drawn, so that it differs a little from run to run."""

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            clouds = [sample[key][None].float() for key in ('pred_points', 'masked_points')]
            self.results.append([chamfer_distance(*clouds, kind).item()
                                 for kind in ('cdl1', 'cdl2')])

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        first, second = torch.tensor(results).mean(0).mul(1000).tolist()
        return dict(cdl1=first, cdl2=second)
