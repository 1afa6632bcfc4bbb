from vmamba_mm.ops.ssd.op import ssd
from vmamba_mm.ops.ssd.step import ssd_step

__all__ = ['ssd', 'ssd_step']
