from vmamba_mm.ops.fused.add_norm.op import add_norm, layer_norm, rms_norm

__all__ = ['add_norm', 'layer_norm', 'rms_norm']
