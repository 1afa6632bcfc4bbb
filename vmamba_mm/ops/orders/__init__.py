from vmamba_mm.ops.orders.op import cross_merge, cross_scan

__all__ = ['cross_merge', 'cross_scan']
