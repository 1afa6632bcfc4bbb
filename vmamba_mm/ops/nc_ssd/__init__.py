from vmamba_mm.ops.nc_ssd.op import nc_ssd

__all__ = ['nc_ssd']
