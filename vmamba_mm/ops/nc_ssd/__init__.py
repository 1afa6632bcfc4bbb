from vmamba_mm.ops.nc_ssd.mixer import nc_ssd_mixer
from vmamba_mm.ops.nc_ssd.op import nc_ssd, nc_ssd_norm

__all__ = ['nc_ssd', 'nc_ssd_mixer', 'nc_ssd_norm']
