from vmamba_mm.ops.fused.patch_norm.op import expand_norm, merge_norm

__all__ = ['expand_norm', 'merge_norm']
