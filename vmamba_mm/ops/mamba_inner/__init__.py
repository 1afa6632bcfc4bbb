from vmamba_mm.ops.mamba_inner.op import mamba_inner

__all__ = ['mamba_inner']
