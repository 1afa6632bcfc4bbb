"""How far images that were made are from those of a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require
from vmamba_mm.registry import METRICS, MODELS


@METRICS.register_module()
class FrechetDistance(BaseMetric):
    """FID (arXiv 1706.08500) by torch-fidelity, of the images of a test and those made beside them.

    Features of all images are kept until the end: 8 kB for each, twice.

    Args:
        features: None for torch-fidelity's Inception network, whose weights it fetches; else a
            module, or the config of one, from (B, 3, H, W) in uint8 to (B, F).
        batch_size: images at a time.

    A sample has ``pred`` and ``image``, (3, H, W) in uint8.
    Results: ``fid``. Only numbers of as many images, mostly 50,000, can be compared.

    Raises:
        UserError: on fewer than two images, which have no covariance.
    """

    def __init__(self, features: nn.Module | dict | None = None, batch_size: int = 64,
                 collect_device: str = 'cpu', prefix: str | None = None):
        super().__init__(collect_device, prefix)
        require('torch_fidelity')
        self.features = MODELS.build(features) if isinstance(features, dict) else features
        self.batch_size = batch_size

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        made, own = (torch.stack([_rgb(sample[key]) for sample in data_samples])
                     for key in ('pred', 'image'))
        self.results += zip(self._features_of(made), self._features_of(own), strict=True)

    @torch.no_grad()
    def _features_of(self, images: Tensor) -> list[np.ndarray]:
        if self.features is None:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            self.features = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'])
        self.features.eval().to(images.device)
        rows = []
        for part in images.split(self.batch_size):
            found = self.features(part)
            found = found[0] if isinstance(found, tuple | list) else found
            rows.extend(found.float().cpu().numpy())
        return rows

    def compute_metrics(self, results: list) -> dict[str, float]:
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        if len(results) < 2:
            raise UserError(f'FID needs at least 2 images, and the test has {len(results)}')
        statistics = []
        for rows in zip(*results, strict=True):
            rows = np.stack(rows).astype(np.float64)
            statistics.append(dict(mu=rows.mean(0), sigma=np.cov(rows, rowvar=False)))
        found = fid_statistics_to_metric(*statistics, verbose=False)
        return dict(fid=float(found['frechet_inception_distance']))


def _rgb(image: Tensor) -> Tensor:
    """(1 or 3, H, W) with three channels."""
    return image.expand(3, -1, -1)
