"""The families of models, as data: published architectures, rules, names of weights.

A family takes these files; everything else is generic and comes from them:

1. ``vmamba_mm/families/NAME.py``, listed at the end of this module: ``FAMILY``, a :class:`Family`
   with the published archs, the rules of an arch, the official names of the weights and ours, the
   signature by which they are recognised, and how an arch is told from weights. No torch.nn and no
   mmengine.
2. ``vmamba_mm/models/NAME.py``, listed in ``vmamba_mm/models/__init__.py``: the blocks and a
   subclass of :class:`vmamba_mm.models.base.Backbone`, whose docstring says what it must have. An
   op of ``vmamba_mm.ops`` and a layer of ``vmamba_mm.layers`` come first where none there fits.
3. ``configs/NAME/metafile.yml``, the only home of what was published, and
4. ``configs/NAME/*.py``, a config for each published model.
5. ``tests/families/NAME.py``: ``SPEC``, a ``Spec`` of ``tests/specs.py``, with small archs and the
   official names written out a second time. All generic tests run on it. A family that takes
   tokens in place of images, :mod:`vmamba_mm.families.mamba_lm`, is no backbone and has tests of
   its own.

Where there are numbers of the official code, ``FAMILY.parity`` says how to compare with them
(:mod:`vmamba_mm.families.parity`). ``tests/made_up`` is a family of exactly these five files, in
the way a package of a user's own would have it: it calls :func:`register_family` and registers its
model with ``vmamba_mm.registry.MODELS``. Families of one paper may share the folder of configs and
that of numbers, their :attr:`Family.system`: :mod:`vmamba_mm.families.vivim` and
:mod:`vmamba_mm.families.timemamba` are both of Video Mamba Suite.

Rules that keep the rest generic:

- All that changes names or shapes of weights, but the channels of images and the norms of outputs,
  is a key of the arch, and :attr:`Family.infer_arch` finds it in the weights or takes it to be as
  published.
- Our names are ``stages.I.blocks.J`` in a backbone of stages and ``blocks.J`` in a flat one;
  ``norm{I}`` is the norm of output I alone, and ``pool_norm`` that of the mean of a map; a head
  beside the backbone is ``head.fc``. Everything before the first block is named by
  ``Backbone.stem``.
- A row of names stands for a name and all below it. What official files have called by several
  names has a row for each, the newest first; what our model computes itself has None in place of
  our name.
- The signature has names that every model of the family has and those of no other family have
  together. If two families say yes, nobody guesses: an error asks which one is meant. Where
  official names are those of another family (Vim and VideoMamba), ours differ, so that our files
  tell.
"""

from collections.abc import Mapping

from vmamba_mm.errors import UserError
from vmamba_mm.families import (
    dis,
    efficientvim,
    mamba_lm,
    mambair,
    mambair_unet,
    mambair_v2,
    mila,
    pointmamba,
    ravlt,
    rmt,
    rs_mamba,
    rsmamba,
    seg_mamba,
    timemamba,
    u_mamba,
    videomamba,
    vim,
    vision_rwkv,
    vivim,
    vm_unet,
    vmamba,
    vssd,
)
from vmamba_mm.families.base import Family, Rule, name_of, resolve_arch
from vmamba_mm.families.names import exact_prefixes, is_counter, outer_wrappers, plain_name
from vmamba_mm.zoo import register_configs, unregister_configs

__all__ = ['FAMILIES', 'Family', 'Rule', 'SeveralFamilies', 'families_at', 'family_of',
           'name_of', 'register_family', 'resolve_arch', 'unregister_family']

#: All families by name.
FAMILIES: dict[str, Family] = {}


class SeveralFamilies(UserError):
    """Names that are those of two families: somebody has to say which one is meant.

    Attributes:
        prefix: what stands before the names.
        families: the two.
    """

    def __init__(self, prefix: str, families: tuple[Family, Family]):
        first, second = families
        super().__init__(
            f'the weights under {prefix!r} are named like those of {first.model} and of '
            f'{second.model}: say which of the families it is; tools/convert_checkpoint.py takes '
            f'--family {first.name} or --family {second.name}, and writes names that tell')
        self.prefix, self.families = prefix, families


def register_family(family: Family) -> Family:
    """Add a family, so that its weights are recognised and its models found.

    Raises:
        ValueError: if there is another family of that name or with that model, or if the name
            cannot be that of a folder and a module.
    """
    if not family.name.isidentifier():
        raise ValueError(f'the family name {family.name!r} must be a Python identifier')
    for other in FAMILIES.values():
        if other is not family and (other.name == family.name or other.model == family.model):
            raise ValueError(f'there is a family {other.name!r} with the model {other.model!r} '
                             'already')
    if FAMILIES.get(family.name) is not family and family.configs is not None:
        register_configs(family.configs)
    FAMILIES[family.name] = family
    return family


def unregister_family(family: Family) -> None:
    """Undo :func:`register_family`."""
    del FAMILIES[family.name]
    if family.configs is not None:
        unregister_configs(family.configs)


def families_at(weights: Mapping[str, object]) -> dict[str, Family]:
    """{prefix: family} of all models that are exactly those of a family.

    Args:
        weights: by plain names, see :func:`vmamba_mm.families.names.exact_prefixes`.

    Raises:
        SeveralFamilies: if two families say that the weights below one prefix are theirs.
    """
    families: dict[str, Family] = {}
    for family in FAMILIES.values():
        for prefix in exact_prefixes(family, weights):
            if prefix in families:
                raise SeveralFamilies(prefix, (families[prefix], family))
            families[prefix] = family
    return families


def family_of(state_dict: Mapping[str, object]) -> Family | None:
    """The family whose weights a state dict holds; None if it is of none.

    A family says yes only if, below one prefix, all names of its signature are there and every
    name has a row: a single name like those of a family means nothing.

    Raises:
        UserError: if two families say yes; SeveralFamilies if they do of the same weights.
    """
    names = {plain_name(k): v for k, v in state_dict.items()
             if isinstance(k, str) and not is_counter(k)}
    start = len(outer_wrappers(names))
    families = families_at({k[start:]: v for k, v in names.items()})
    if len({f.name for f in families.values()}) > 1:
        shown = ' and '.join(f'{f.model} under {prefix!r}' for prefix, f in families.items())
        raise UserError(f'the weights are those of several families: {shown}')
    return next(iter(families.values()), None)


for _module in (vmamba, mamba_lm, vim, videomamba, vivim, timemamba, vision_rwkv, vssd, rmt,
                mila, ravlt, rs_mamba, rsmamba, vm_unet, efficientvim, u_mamba, seg_mamba, mambair,
                mambair_v2, mambair_unet, dis, pointmamba):
    register_family(_module.FAMILY)
