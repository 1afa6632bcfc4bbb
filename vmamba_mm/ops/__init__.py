"""The ops of VMamba: functions on tensors, torch only. The maths is in README.md beside this."""

from vmamba_mm.ops.backends import BACKENDS
from vmamba_mm.ops.cross_scan import cross_merge, cross_scan
from vmamba_mm.ops.selective_scan import selective_scan
from vmamba_mm.ops.ss2d_scan import ss2d_scan, ss2d_scan_norm

__all__ = ['BACKENDS', 'cross_merge', 'cross_scan', 'selective_scan', 'ss2d_scan',
           'ss2d_scan_norm']
