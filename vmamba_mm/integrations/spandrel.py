"""MambaIR and MambaIRv2 for spandrel, the model loader of upscaling tools.

``import vmamba_mm.spandrel``, before a model is loaded; ``spandrel.ModelLoader`` then takes their
files, as all that is built on it.
"""

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    SizeRequirements,
)
from torch import Tensor

from vmamba_mm import models
from vmamba_mm.families import FAMILIES, Family, family_of
from vmamba_mm.models.restorer import Restorer


class RestorerArchitecture(Architecture[Restorer]):
    """A family of networks of restoration, for spandrel's registry.

    Args:
        family: of one.
    """

    def __init__(self, family: Family):
        super().__init__(id=family.model, detect=lambda state: family_of(state) is family)
        self.family = family

    def load(self, state_dict: dict[str, Tensor]) -> ImageModelDescriptor[Restorer]:
        cls = getattr(models, self.family.model)
        arch = self.family.infer_arch(state_dict)
        network = cls(arch, **cls.arguments_of(state_dict))
        return ImageModelDescriptor(
            network, state_dict, architecture=self,
            purpose='SR' if network.scale > 1 else 'Restoration',
            tags=[f'{arch["embed_dims"]}dim'], supports_half=False, supports_bfloat16=True,
            scale=network.scale, input_channels=network.in_channels,
            output_channels=network.in_channels,
            size_requirements=SizeRequirements(multiple_of=network.size_multiple),
            tiling=ModelTiling.SUPPORTED)


#: By family; they are in spandrel's main registry, and tried first, since they take exactly their
#: own files.
ARCHITECTURES = {name: RestorerArchitecture(FAMILIES[name])
                 for name in ('mambair', 'mambair_v2', 'mambair_unet')}
_others = tuple(support.architecture.id for support in MAIN_REGISTRY.architectures()
                if support.architecture.id not in {f.id for f in ARCHITECTURES.values()})
MAIN_REGISTRY.add(*(ArchSupport.from_architecture(arch, before=_others)
                    for arch in ARCHITECTURES.values()), ignore_duplicates=True)
