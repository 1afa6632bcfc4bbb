from vmamba_mm.ops.cross_scan.op import cross_merge, cross_scan

__all__ = ['cross_merge', 'cross_scan']
