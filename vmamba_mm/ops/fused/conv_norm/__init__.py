from vmamba_mm.ops.fused.conv_norm.op import channels_last, conv_norm

__all__ = ['channels_last', 'conv_norm']
