"""What RMT and RAVLT have in common: a projection of the last map before the classifier's mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers import LayerNorm2d
from vmamba_mm.layers.maps import batch_norm_map
from vmamba_mm.models.base import Backbone

#: Channels of the projection of all published classifiers.
PROJECTION = 1024


class MapProjection(nn.Module):
    """What the published classifiers have before their pooling: Linear, batch norm and SiLU.

    Shape: (B, C, H, W) -> (B, C', H, W).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, out_dim)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(batch_norm_map(self.norm, self.proj(x.permute(0, 2, 3, 1)))).permute(
            0, 3, 1, 2)


class ProjectedBackbone(Backbone):
    """A backbone of stages with a LayerNorm for each output, ``norm{i}``, or for the last one, in
    classifiers, a :class:`MapProjection`.

    Args:
        arch: with the keys ``embed_dims`` and ``depths``, a number for each stage.
        out_indices: stages to return; all by default.
        projection: channels of the projection; None for none.
        kwargs: as of :class:`Backbone`.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    classifier_options = dict(projection=PROJECTION)
    #: Of the norms of outputs.
    norm_eps = 1e-5

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, projection: int | None = None, **kwargs):
        if projection is not None and (not isinstance(projection, int) or projection < 1):
            raise ValueError('projection must be an int of at least 1, or None, got '
                             f'{projection!r}')
        # add_norms() asks for it, and so does who builds a plain model with the same outputs.
        self.output_options = {} if projection is None else dict(projection=projection)
        super().__init__(arch, out_indices, **kwargs)
        if projection is not None and not self.returns_last_stage:
            raise ValueError('projection is of the last stage, which '
                             f'out_indices={self.out_indices} lacks')

    @property
    def returns_last_stage(self) -> bool:
        return self.out_indices[-1] == len(self.depths) - 1

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], list(arch['embed_dims'])

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return math.ceil(size / cls.stage_strides(arch)[-1])

    def add_norms(self) -> None:
        """The norms of the outputs and the projection, for :meth:`build`."""
        dims = self.num_features
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i], eps=self.norm_eps))
        if self.output_options:
            out_dim = self.output_options['projection']
            self.add_module(f'norm{len(dims) - 1}', MapProjection(dims[-1], out_dim))
            self.num_features = [*dims[:-1], out_dim]
