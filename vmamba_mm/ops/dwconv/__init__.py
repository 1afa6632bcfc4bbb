from vmamba_mm.ops.dwconv.op import dwconv_silu

__all__ = ['dwconv_silu']
