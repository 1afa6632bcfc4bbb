from vmamba_mm.ops.selective_scan.op import selective_scan
from vmamba_mm.ops.selective_scan.step import selective_scan_step

__all__ = ['selective_scan', 'selective_scan_step']
