import vmamba_mm.loading  # noqa: F401 (mmengine reads official checkpoints from here on)
from vmamba_mm.models.vmamba import VMamba

__all__ = ['VMamba']
