from vmamba_mm.models.vmamba import VMamba

__all__ = ['VMamba']
