from vmamba_mm.ops.wkv.op import bi_wkv, wkv
from vmamba_mm.ops.wkv.step import wkv_step

__all__ = ['bi_wkv', 'wkv', 'wkv_step']
