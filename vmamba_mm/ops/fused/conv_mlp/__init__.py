from vmamba_mm.ops.fused.conv_mlp.op import conv_mlp

__all__ = ['conv_mlp']
