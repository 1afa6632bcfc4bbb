from vmamba_mm.ops.conv_norm.op import channels_last, conv_norm

__all__ = ['channels_last', 'conv_norm']
