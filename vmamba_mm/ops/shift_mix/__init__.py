from vmamba_mm.ops.shift_mix.op import shift_mix

__all__ = ['shift_mix']
