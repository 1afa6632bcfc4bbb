from vmamba_mm.ops.conv_norm.op import conv_norm

__all__ = ['conv_norm']
