from vmamba_mm.ops.ss2d_scan.op import ss2d_scan

__all__ = ['ss2d_scan']
