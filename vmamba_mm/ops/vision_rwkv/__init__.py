from vmamba_mm.ops.vision_rwkv.op import channel_mixer, spatial_mixer

__all__ = ['channel_mixer', 'spatial_mixer']
