from vmamba_mm.ops.fused.stem.op import conv_norm_gelu

__all__ = ['conv_norm_gelu']
