from vmamba_mm.ops.selective_scan.op import selective_scan

__all__ = ['selective_scan']
