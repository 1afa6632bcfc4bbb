from vmamba_mm.ops.fused.linear_relu.op import linear_relu

__all__ = ['linear_relu']
