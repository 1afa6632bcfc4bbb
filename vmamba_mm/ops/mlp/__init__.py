from vmamba_mm.ops.mlp.op import mlp

__all__ = ['mlp']
