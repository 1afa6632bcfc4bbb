from vmamba_mm.ops.ss2d.op import ss2d, why_not

__all__ = ['ss2d', 'why_not']
