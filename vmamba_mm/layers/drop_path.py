"""Stochastic depth (arXiv 1603.09382), per sample."""

import torch
import torch.fx
from torch import Tensor, nn


def _scale_samples(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


torch.fx.wrap('_scale_samples')  # which looks at the number of dimensions


class DropPath(nn.Module):
    """Zero a residual branch for whole samples with probability ``drop_prob`` while training.

    Branches that stay are scaled by ``1 / (1 - drop_prob)``. Any shape with the batch first.

    Raises:
        ValueError: if ``drop_prob`` is outside [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f'drop_prob must be in [0, 1), got {drop_prob}')
        self.drop_prob = drop_prob

    def factors(self, x: Tensor, branches: int) -> tuple[Tensor | None, ...]:
        """The factors of the samples, (B), fp32, for each of ``branches`` branches beside ``x``;
        None for 1. They are drawn together, as small batches wait for the calls."""
        if not self.training or self.drop_prob == 0.0:
            return (None,) * branches
        keep = 1.0 - self.drop_prob
        factors = x.new_empty((branches, x.shape[0]), dtype=torch.float32)
        return factors.bernoulli_(keep).div_(keep).unbind()

    def forward(self, x: Tensor) -> Tensor:
        factors, = self.factors(x, 1)
        return x if factors is None else _scale_samples(x, factors)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'
