from vmamba_mm.ops.fused.dwconv.op import dwconv_silu

__all__ = ['dwconv_silu']
