from vmamba_mm.ops.fused.dwconv.op import dwconv_add, dwconv_silu

__all__ = ['dwconv_add', 'dwconv_silu']
