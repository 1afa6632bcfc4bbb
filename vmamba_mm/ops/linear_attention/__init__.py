from vmamba_mm.ops.linear_attention.op import linear_attention

__all__ = ['linear_attention']
