from vmamba_mm.ops.fused.mlp.op import mlp

__all__ = ['mlp']
