"""Classifiers of a family and the same as their authors run them, for benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch.nn.functional as F
from torch import Tensor, nn

import vmamba_mm.timm  # noqa: F401 (registers the classifiers)


class PublishedForm(nn.Module):
    """A classifier of timm's, whose modules it has, run step by step.

    Shape: (B, 3, H, W) -> (B, classes).
    """

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier


@dataclass(frozen=True)
class Twins:
    """The classifiers of a family, and the published form of each.

    Attributes:
        family: with which timm's names begin.
        sizes: the archs.
        backbone: (arch, height, width) -> a backbone for images of this size, whose maps are timed.
        published: makes the published form of a classifier of timm's.
    """

    family: str
    sizes: tuple[str, ...]
    backbone: Callable[[str, int, int], nn.Module]
    published: Callable[[nn.Module], PublishedForm]

    @property
    def ours(self) -> dict[str, str]:
        """{name of a model: its arch}."""
        return {f'{self.family}_{size}': size for size in self.sizes}

    @property
    def theirs(self) -> dict[str, str]:
        """The same of the published forms."""
        return {f'published_{name}': size for name, size in self.ours.items()}

    def make(self, name: str, output: str, height: int, width: int) -> nn.Module:
        """One of ``ours`` or ``theirs``: a classifier, or, of ours, a backbone for images of a size
        if ``output`` is 'maps'.

        Raises:
            ValueError: if a published form is asked for maps.
        """
        if output == 'maps':
            if name in self.theirs:
                raise ValueError(f'{name} is a classifier alone; its maps are not timed')
            return self.backbone(self.ours[name], height, width)
        model = timm.create_model(name.removeprefix('published_'), drop_path_rate=0.0)
        return self.published(model) if name in self.theirs else model


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What ``norm`` calculates, as an op of its own."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
