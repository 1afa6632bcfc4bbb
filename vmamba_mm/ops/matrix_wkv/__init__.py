from vmamba_mm.ops.matrix_wkv.bidirectional import bi_wkv6
from vmamba_mm.ops.matrix_wkv.op import wkv5, wkv6, wkv7
from vmamba_mm.ops.matrix_wkv.step import wkv6_step, wkv7_step

__all__ = ['bi_wkv6', 'wkv5', 'wkv6', 'wkv6_step', 'wkv7', 'wkv7_step']
