from vmamba_mm.ops.ss2d_scan.attention import ScanAttention, ss2d_attention
from vmamba_mm.ops.ss2d_scan.op import ss2d_scan, ss2d_scan_norm

__all__ = ['ScanAttention', 'ss2d_attention', 'ss2d_scan', 'ss2d_scan_norm']
