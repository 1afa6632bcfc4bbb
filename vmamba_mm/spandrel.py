"""``import vmamba_mm.spandrel``: spandrel's loader then knows MambaIR and MambaIRv2."""

from vmamba_mm.integrations.spandrel import ARCHITECTURES

__all__ = ['ARCHITECTURES']
