"""What :mod:`vmamba_mm.families.mamba_lm` has to know of the mixers of its language models."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmamba_mm.families.base import Rows, Rule, is_int, is_number

Arch = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Mixers:
    """One mixer or more, whose models have the names and files of one system."""

    #: By a mixer's name, what an arch need not say of a model with it.
    options: Mapping[str, Mapping[str, Any]]
    #: The rules of these options.
    rules: Mapping[str, Rule]
    #: (arch, number of a layer) -> the mixer of the layer, and its keyword arguments.
    mixer_of: Callable[[Arch, int], tuple[str, dict[str, Any]]]
    #: Names of weights, official and ours; or (all names of a model) -> these, where the rows of
    #: one layer are not those of another.
    keys: Rows | Callable[[Collection[str]], Rows]
    #: (shapes by our names) -> the arch but for what :mod:`vmamba_mm.families.mamba_lm` tells of
    #: every model. As :attr:`Family.infer_arch`.
    infer: Callable[[Shapes], dict[str, Any]]
    #: What names of weights match, official ones or ours, that models with other mixers have not;
    #: None for the mixers whose models have none of the others'.
    own_names: re.Pattern[str] | None = None
    #: What an arch need not say of the whole model, where that is not as with Mamba.
    defaults: Arch = field(default_factory=dict)
    #: The published models by name.
    archs: Mapping[str, Arch] = field(default_factory=dict)
    #: Checks of a whole arch, after the rules: raises ValueError.
    check: Callable[[Arch], None] = lambda arch: None
    #: (arch) -> an option that weights alone do not tell and no default can stand for, and what to
    #: say of it after 'the weights do not tell'; ('', '') if there is none.
    untold: Callable[[Arch], tuple[str, str]] = lambda arch: ('', '')
    #: By ``model_type`` of transformers: (``config.json``) -> arch. KeyError if a size is missing,
    #: ValueError on what has no counterpart.
    configs: Mapping[str, Callable[[Arch], dict[str, Any]]] = field(default_factory=dict)

    def has_own(self, names: Collection[str]) -> bool:
        """Whether names, official or ours, tell that a model has such mixers."""
        return self.own_names is not None and any(self.own_names.search(name) for name in names)


def below(place: str, shapes: Shapes) -> Shapes:
    """What is named ``place`` and more, without it."""
    return {k.removeprefix(place): v for k, v in shapes.items() if k.startswith(place)}


def depth_of(shapes: Shapes) -> int:
    """The number of blocks."""
    return len({m[1] for k in shapes if (m := re.match(r'blocks\.(\d+)\.', k))})


# --- rules that several mixers have -------------------------------------------------------------

POSITIVE = Rule(lambda v: is_int(v, 1), 'an int of at least 1', optional=True)
POSITIVE_OR_NONE = Rule(lambda v: v is None or is_int(v, 1), 'None or an int of at least 1',
                        optional=True)
NOT_NEGATIVE_OR_NONE = Rule(lambda v: v is None or is_int(v, 0), 'None or an int of at least 0',
                            optional=True)
ABOVE_0 = Rule(lambda v: is_number(v) and v > 0, 'a number above 0', optional=True)
BOOL = Rule(lambda v: isinstance(v, bool), 'True or False', optional=True)
RATE = Rule(lambda v: is_number(v, 0) and v < 1, 'a number of at least 0 and below 1',
            optional=True)
