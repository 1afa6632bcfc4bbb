"""What a family is: published architectures, the rules of an ``arch``, the names of weights.

Plain data and functions on names: no module, no mmengine, so that reading and converting a file
builds no model.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmamba_mm.families.parity import Parity

#: (official name, our name) of a module or a weight. ``#`` stands for a number, a name for itself
#: and all that begins with it and a dot. Without our name (None) the weight is left out, as buffers
#: that our model computes.
Rows = tuple[tuple[str, str | None], ...]
#: Of :attr:`Family.shapes`.
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Rule:
    """A rule for the values of a key of an arch."""

    allows: Callable[[Any], bool]
    choices: str  #: for messages, after 'it must be'
    optional: bool = False  #: whether an arch may lack the key

    def or_absent(self) -> 'Rule':
        """The same rule for a key that an arch may lack."""
        return replace(self, optional=True)


@dataclass(frozen=True, eq=False)
class Family:
    """All that the package knows of a family besides its modules."""

    #: Before an architecture in the names of published weights, vmamba_mm://NAME/ARCH.
    name: str
    #: The class in vmamba_mm.models, and what messages call the family.
    model: str
    #: The published architectures by name.
    archs: Mapping[str, Mapping[str, Any]]
    #: The keys of an arch, in the order of messages.
    rules: Mapping[str, Rule]
    #: Names of the backbone's weights, official and ours. Where a family has variants whose names
    #: contradict each other, a function that gives the rows of the variant that has these names
    #: (official or ours).
    keys: Rows | Callable[[Collection[str]], Rows]
    #: Our names of weights that every model of the family has, and the models of no other family
    #: all of. The first is looked for to find where a model lies inside another.
    signature: tuple[str, ...]
    #: (weights of a backbone by our names) -> its arch, as a dict. What leaves no trace in names
    #: and shapes is taken to be as published. Raises KeyError on a name that is absent and
    #: ValueError on a shape that no model of the family has: then the weights are not its own.
    infer_arch: Callable[[Mapping[str, Any]], dict[str, Any]]
    #: Like ``keys``, for names of the backbone's weights that only official classifiers have.
    classifier_keys: Rows | Callable[[Collection[str]], Rows] = ()
    #: Like ``keys``, for weights that our models have beside the backbone, such as ``head.fc``, or
    #: ``decode_head.conv_seg`` of segmentors; a function is given the names that lie there.
    head_keys: Rows | Callable[[Collection[str]], Rows] = ()
    #: Width of the hidden layer, linear and with a tanh, in the heads of published classifiers, by
    #: arch; those of others are a single layer. Its weights are ``head.layers.pre_logits`` and
    #: those of the classifier behind it ``head.layers.head``.
    head_dims: Mapping[str, int] = field(default_factory=dict)
    #: Other classes than ``model``, of published detectors and segmentors: by our name of a weight
    #: that the class alone has. Their names are in ``keys``.
    dense_models: Mapping[str, str] = field(default_factory=dict)
    #: The task of official files of whole models, which have the head: 'cls', or 'seg'.
    task: str = 'cls'
    #: Where these have the backbone, such as 'visual.'; '' for at the top.
    place: str = ''
    #: Whether the head lies there too, and not beside.
    has_head_inside: bool = False
    #: Our names of Linear weights that official files may hold as (out, in, 1, 1), as a regular
    #: expression.
    linear: str | None = None
    #: Our names of weights of shape (1,) that official files hold as scalars, which FSDP cannot
    #: share out, as a regular expression.
    scalars: str | None = None
    #: Our names, as a regular expression, and the shapes in which official files hold these weights
    #: and our models do: in order, None for each dimension that both have, 1 for one that is added.
    shapes: tuple[tuple[str, Shape, Shape], ...] = ()
    #: (official name, formula) of tables that official files hold and our model computes, whose row
    #: has None in place of our name: from the table of a file, for its shape and dtype, to what it
    #: must be. It raises ValueError on a shape that no such table has.
    tables: tuple[tuple[str, Callable[[Any], Any]], ...] = ()
    #: Our names of the first convolutions, which can be adapted to other channels of images.
    first_convs: tuple[str, ...] = ()
    #: Checks of a whole arch, after the rules: raises ValueError.
    check: Callable[[Mapping[str, Any]], None] | None = None
    #: The folder of its configs, configs/SYSTEM, and of official numbers, where several families
    #: share one; '' for their own, of the family's name. One of the families has the ``parity``.
    system: str = ''
    #: What its models take: 'images', of which timm has the models too, 'tokens' of text, or images
    #: and 'volumes' in a framework of medicine.
    takes: str = 'images'
    #: Whether timm has the models itself, under the names that it would get for ours; then it gets
    #: none.
    in_timm: bool = False
    #: Under which key official files hold the weights of a whole model; '' for at the top.
    weights_key: str = 'model'
    #: Of the official code and weights, such as 'MIT', or 'none stated'; and where they are.
    licence: str = ''
    url: str = ''
    #: The folder with metafile.yml and the configs, if it is not configs/NAME of this package.
    configs: Path | None = None
    #: What tools/check_parity.py needs to compare the family with the official code.
    parity: Parity | None = None
    #: The same for folders of other names, by name: of a variant of the family, or of its layers.
    parity_folders: Mapping[str, Parity] = field(default_factory=dict)

    def rows(self, names: Collection[str]) -> Rows:
        """The rows of a backbone, of the variant that has these names (official or ours)."""
        return self.keys(names) if callable(self.keys) else self.keys

    def head_rows(self, names: Collection[str]) -> Rows:
        """The rows of what is beside a backbone, of the variant that has these names."""
        return self.head_keys(names) if callable(self.head_keys) else self.head_keys

    def classifier_rows(self, names: Collection[str]) -> Rows:
        """The rows of what only official classifiers have in a backbone."""
        return (self.classifier_keys(names) if callable(self.classifier_keys)
                else self.classifier_keys)

    def model_of(self, names: Collection[str]) -> str:
        """The class in vmamba_mm.models whose weights have these names, which are ours."""
        return next((model for name, model in self.dense_models.items() if name in names),
                    self.model)

    def all_rows(self, names: Collection[str]) -> Rows:
        """The same, with those that official classifiers have besides."""
        return self.classifier_rows(names) + self.rows(names) + self.head_rows(names)


def resolve_arch(family: Family, arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a named architecture, or a checked copy of a user's dict.

    With the key ``base``, the name of a published architecture, the dict only says what differs
    from it: ``dict(base='tiny_s1l8', depths=(2, 2, 4, 2))``.

    Raises:
        ValueError: on an unknown name, unknown or missing keys, or a value that is not allowed.
    """
    required = [key for key, rule in family.rules.items() if not rule.optional]
    optional = [key for key, rule in family.rules.items() if rule.optional]
    if isinstance(arch, str):
        if arch not in family.archs:
            raise ValueError(f'arch={arch!r} does not exist; choose one of '
                             f'{sorted(family.archs)}, or pass a dict with the keys '
                             f'{required} (optional: {optional}), or with base=NAME '
                             'and the keys that differ from it')
        return dict(family.archs[arch])
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be a name or a dict, got {type(arch).__name__}; names: '
                         f'{sorted(family.archs)}')
    if 'base' in arch:
        base = arch['base']
        if not isinstance(base, str) or base not in family.archs:
            raise ValueError(f"arch['base']={base!r} does not exist; choose one of "
                             f'{sorted(family.archs)}')
        arch = {**family.archs[base], **{k: v for k, v in arch.items() if k != 'base'}}
    unknown = sorted(set(arch) - set(family.rules))
    missing = sorted(set(required) - set(arch))
    if unknown or missing:
        raise ValueError(f'arch has unknown keys {unknown} and lacks {missing}; it must have '
                         f'the keys {required} and may have {optional}')
    for key, rule in family.rules.items():
        if key in arch and not rule.allows(arch[key]):
            raise ValueError(f'arch[{key!r}]={arch[key]!r} is not allowed; it must be '
                             f'{rule.choices}')
    if family.check is not None:
        family.check(arch)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arch.items()}


def name_of(family: Family, arch: Mapping[str, Any]) -> str | None:
    """The published name of a resolved architecture, if it has one."""
    return next((name for name, settings in family.archs.items() if settings == arch), None)


def infer_image_size(num_patches: int, patch_size: int) -> int | tuple[int, int]:
    """Height and width of an image of so many patches, for ``infer_arch``; an int if it is square.

    Which of its sides is longer, and by how much, leaves no trace: it is taken to be as near to a
    square as the number of patches allows, and wide.

    Raises:
        ValueError: if there is no patch.
    """
    if num_patches < 1:
        raise ValueError('the position embedding is of no patch')
    rows = next(n for n in range(math.isqrt(num_patches), 0, -1) if num_patches % n == 0)
    columns = num_patches // rows
    return rows * patch_size if rows == columns else (rows * patch_size, columns * patch_size)


def count_blocks(names: Iterable[str], num_stages: int) -> tuple[int, ...]:
    """How many blocks, ``stages.I.blocks.J``, each stage has, for ``infer_arch``."""
    found = {match.groups() for name in names
             if (match := re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name))}
    return tuple(sum(stage == str(i) for stage, _ in found) for i in range(num_stages))


def sizes_of_stages(shapes: Mapping[str, tuple[int, ...]], name: str, num_stages: int
                    ) -> tuple[int, ...]:
    """The first dimension of ``stages.I.NAME`` for each stage, for ``infer_arch``; 0 where a part
    of a file lacks it.

    Raises:
        KeyError: if the first stage lacks it.
    """
    return (shapes[f'stages.0.{name}'][0],
            *(shapes.get(f'stages.{i}.{name}', (0,))[0] for i in range(1, num_stages)))


# --- tests of values, for rules ---------------------------------------------------------------

def is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: Any, low: float = -math.inf) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value) and value >= low)


def are_ints(value: Any, low: int, length: int) -> bool:
    return (isinstance(value, (tuple, list)) and len(value) == length
            and all(is_int(v, low) for v in value))


def one_of(*choices: str) -> Rule:
    """A rule that allows these strings."""
    *first, last = map(repr, choices)
    return Rule(lambda v: isinstance(v, str) and v in choices,
                f'{", ".join(first)} or {last}' if first else last)
