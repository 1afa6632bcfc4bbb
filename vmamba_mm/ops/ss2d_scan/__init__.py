from vmamba_mm.ops.ss2d_scan.op import ss2d_scan, ss2d_scan_norm

__all__ = ['ss2d_scan', 'ss2d_scan_norm']
