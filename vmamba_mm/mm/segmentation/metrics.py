"""Metrics of one class beside the background, on mmseg's sums of areas."""

from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.registry import METRICS

prepare_mm()
require_working('mmseg')

from mmseg.evaluation import IoUMetric  # noqa: E402


@METRICS.register_module()
class ForegroundMetric(IoUMetric):
    """Precision, recall, F1 and IoU of one class over all pixels of all images, in percent.

    What is 0 / 0, as the precision where nothing was found, is 0, as torchmetrics has it.

    Args:
        foreground: number of the class.
        kwargs: of mmseg's ``IoUMetric``, whose table of all classes is logged as well.
    """

    def __init__(self, foreground: int = 1, **kwargs):
        super().__init__(**dict(iou_metrics=['mIoU', 'mFscore']) | kwargs)
        self.foreground = foreground

    def compute_metrics(self, results: list) -> dict[str, float]:
        super().compute_metrics(results)
        if self.format_only:
            return {}
        intersect, union, predicted, labelled = (
            sum(areas)[self.foreground].item() for areas in zip(*results, strict=True))
        precision, recall = _percent(intersect, predicted), _percent(intersect, labelled)
        return dict(Precision=precision, Recall=recall,
                    F1=_percent(2 * intersect, predicted + labelled),
                    IoU=_percent(intersect, union))


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
