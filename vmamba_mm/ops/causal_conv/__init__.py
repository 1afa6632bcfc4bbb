from vmamba_mm.ops.causal_conv.op import causal_conv
from vmamba_mm.ops.causal_conv.step import causal_conv_step

__all__ = ['causal_conv', 'causal_conv_step']
