"""What the generic tests want to know of a family, and all families that they run on.

A family's spec is ``SPEC`` in ``tests/families/NAME.py``. The last one is of a family that is made
up (``tests/made_up``), which shows that nothing else is needed.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vmamba_mm.families import (
    FAMILIES,
    Family,
    SeveralFamilies,
    family_of,
    register_family,
    unregister_family,
)
from vmamba_mm.models.base import Backbone

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """A family under test.

    Attributes:
        family, model: the family and its class.
        archs: small architectures that together have all of the family's parts.
        shapes: (arch, height, width of the image) -> (C, H, W) of the map of each stage, or
            (C, T, H, W) of a clip of ``clip_length`` frames or a volume of ``slices``.
        changes: keys of the first arch that change, each of which weights tell.
        wrong: (keys of the first arch that change, message) of what is refused.
        official: (backbone) -> its weights as official files have them, for each generation of
            names, without a prefix.
        official_classifiers: (backbone of a classifier, with the last output alone, classes) -> the
            same with the head; of segmentors where these were published.
        layer_depths: {name of a parameter of the first arch: its depth}.
        a_weight: name of a Linear's weight in a block of every arch.
        sizes: of images, the odd ones that a family takes.
        repeatable: arguments of the model with which a step of training without dropped paths is
            the same each time.
        drop_path_rates: (arch, rate) -> that of each block, if not linear from 0 to the last.
        is_of_points: the family takes clouds, (B, N, C), of as many points as an image has pixels.
        slices: of volumes, (B, C, slices, H, W), where the family takes these.
        called_often: a regular expression of the modules that run several times in a call.
        nudge: up to which the tests of the contract raise every parameter; less where wide layers
            would add it up.
        zero_grads: one of the parameters whose gradients are zero but for rounding; no other
            family has these names.
        shares_names: (arch) -> whether another family's models have the same official names and
            shapes, so that only who asks for one of the families can tell.
        whole_model: (arch, name in the zoo) -> a whole published model, where the head is more than
            a layer; '' is the model that ``official_classifiers`` has the weights of.
        published_keys: gives {arch: {official name: shape}} of the published classifiers, or None
            where the list is not at hand; None if nothing was published.
    """

    family: Family
    model: type[Backbone]
    archs: Mapping[str, Mapping[str, Any]]
    shapes: Callable[[Mapping, int, int], Sequence[tuple[int, ...]]]
    changes: Sequence[Mapping[str, Any]]
    wrong: Sequence[tuple[Mapping[str, Any], str]]
    official: Callable[[Backbone], list[State]]
    official_classifiers: Callable[[Backbone, int], list[State]]
    layer_depths: Mapping[str, int]
    a_weight: str
    sizes: Sequence[tuple[int, int]] = ((1, 1), (1, 50), (31, 33), (64, 32))
    repeatable: Mapping[str, Any] = field(default_factory=dict)
    drop_path_rates: Callable[[Mapping, float], Sequence[float]] | None = None
    is_of_points: bool = False
    slices: int = 0
    called_often: str = '(?!)'
    nudge: float = 0.1
    zero_grads: str = '(?!)'
    shares_names: Callable[[Mapping], bool] = lambda arch: False
    whole_model: Callable[[str | Mapping, str], torch.nn.Module] | None = None
    published_keys: Callable[[], Mapping[str, Mapping[str, tuple]] | None] | None = None

    @property
    def first(self) -> Mapping[str, Any]:
        return next(iter(self.archs.values()))

    def stages(self, arch: str | Mapping[str, Any]) -> range:
        """The numbers of the stages of an architecture."""
        arch = self.family.archs[arch] if isinstance(arch, str) else arch
        return range(len(self.model.stage_sizes(arch)[0]))

    def published(self, arch: str, is_classifier: bool = False) -> Backbone:
        """A published model on the meta device, built once in a process: only to be looked at.

        Args:
            arch: its name.
            is_classifier: as classifiers have it, with its last output alone.
        """
        if is_classifier or self.model.is_flat:
            return _on_meta(self.model, arch, tuple(self.of_classifiers(arch).items()))
        return _on_meta(self.model, arch, (('out_indices', tuple(self.stages(arch))),))

    @property
    def head(self) -> str:
        """Our name of the last layer of a whole model of the family's task."""
        return {'cls': 'head.fc', 'seg': 'decode_head.conv_seg'}[self.family.task]

    def head_weights(self, arch: Mapping[str, Any]) -> set[str]:
        """Our names of what whole published models have beside the backbone."""
        if self.whole_model is None:
            return {f'{self.head}.weight', f'{self.head}.bias'}
        with torch.device('meta'):
            names = self.whole_model(arch, '').state_dict()
        return {name for name in names if not name.startswith('backbone.')}

    def of_classifiers(self, arch: str | Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of a classifier's backbone, or of what else is published of the family."""
        settings = self.family.archs[arch] if isinstance(arch, str) else arch
        pooled = dict(out_type='avg_featmap') if self.model.has_pool_norm(settings) else {}
        return dict({'out_indices': tuple(self.stages(arch)[-1:]), **self.model.classifier_options},
                    **pooled)

    def place_in(self, state: State) -> str:
        """Where official weights have the backbone: its family's place, or at the top."""
        place = self.family.place
        return place if any(key.startswith(place) for key in state) else ''

    def told_archs(self) -> dict[str, str]:
        """{published arch: the one that its weights tell}: the first with these names and shapes.

        Others differ from it in what leaves no trace in weights.
        """
        firsts: dict[Any, str] = {}
        return {name: firsts.setdefault(frozenset(
            (k, v.shape) for k, v in self.published(name).state_dict().items()), name)
            for name in self.family.archs}

    def told(self, arch: str | Mapping[str, Any], state: State) -> dict[str, Family]:
        """What functions have to be told besides a state of official names: the family, or nothing.

        And that they are right in it: the family is found, or an error names two.
        """
        arch = self.family.archs[arch] if isinstance(arch, str) else arch
        if not self.shares_names(arch):
            assert family_of(state) is self.family
            return {}
        model, name = self.family.model, self.family.name
        with pytest.raises(SeveralFamilies, match=rf'of .*\b{model}\b.*: say .*--family {name}'):
            family_of(state)
        return dict(family=self.family)

    def takes_clips(self, arch: str | Mapping[str, Any]) -> bool:
        arch = self.family.archs[arch] if isinstance(arch, str) else arch
        return bool(self.slices) or self.model.clip_length(arch) > 0

    def input(self, arch: Mapping[str, Any], batch: int, channels: int, height: int, width: int,
              device: str = 'cpu') -> Tensor:
        """Random images, (B, C, H, W), clips of the length of the arch, volumes, or clouds."""
        if self.is_of_points:
            # Halves have the same values, as which of two points is farther decides on the order.
            points = torch.randn(batch, height * width, channels, device=device)
            return points.bfloat16().float()
        frames = [self.slices or self.model.clip_length(arch)] if self.takes_clips(arch) else []
        return torch.randn(batch, channels, *frames, height, width, device=device)

    def random_model(self, arch: Mapping[str, Any] | None = None, seed: int = 0, **kwargs
                     ) -> Backbone:
        """Every parameter is random, those that start as ones and zeros as well; in eval mode."""
        torch.manual_seed(seed)
        model = self.model(arch or self.first, **kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        return model


@functools.cache
def _on_meta(model, arch, options):
    with torch.device('meta'):
        return model(arch, **dict(options))


_TESTS = Path(__file__).parent
sys.path.insert(0, str(_TESTS))
SPECS = {name: importlib.import_module(module).SPEC for name, module in [
    *((p.stem, f'families.{p.stem}') for p in sorted((_TESTS / 'families').glob('*.py'))),
    ('made_up', 'made_up.spec')]}

each_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
each_arch = pytest.mark.parametrize('spec, arch', [
    pytest.param(spec, arch, id=f'{name}-{which}') for name, spec in SPECS.items()
    for which, arch in spec.archs.items()])

#: Those whose channels are of images, or volumes, and no coordinates.
each_image_arch = pytest.mark.parametrize('spec, arch', [
    pytest.param(spec, arch, id=f'{name}-{which}') for name, spec in SPECS.items()
    if not spec.is_of_points for which, arch in spec.archs.items()])


def each(attribute):
    """A test for every item of an attribute of each spec: it takes ``spec`` and ``item``."""
    return pytest.mark.parametrize('spec, item', [
        pytest.param(spec, item, id=f'{name}-{i}') for name, spec in SPECS.items()
        for i, item in enumerate(getattr(spec, attribute))])


@pytest.fixture(autouse=True)
def registered(request):
    """The family of the test is among those of the package."""
    spec = request.node.callspec.params.get('spec') if hasattr(request.node, 'callspec') else None
    if spec is None or spec.family.name in FAMILIES:
        yield
        return
    register_family(spec.family)
    yield
    unregister_family(spec.family)
