from vmamba_mm.ops.orders.op import cross_merge, cross_scan
from vmamba_mm.ops.orders.slices import across_slices, along_slices

__all__ = ['across_slices', 'along_slices', 'cross_merge', 'cross_scan']
