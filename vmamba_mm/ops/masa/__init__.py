from vmamba_mm.ops.masa.mixer import masa_mixer
from vmamba_mm.ops.masa.op import decay_masks, masa, needs_masks

__all__ = ['decay_masks', 'masa', 'masa_mixer', 'needs_masks']
