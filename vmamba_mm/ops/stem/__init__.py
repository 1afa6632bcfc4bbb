from vmamba_mm.ops.stem.op import conv_norm_gelu

__all__ = ['conv_norm_gelu']
