from vmamba_mm.ops.masa.op import decay_masks, masa

__all__ = ['decay_masks', 'masa']
