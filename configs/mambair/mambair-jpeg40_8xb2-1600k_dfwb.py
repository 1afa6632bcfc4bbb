# MambaIR, JPEG of the quality 40.
_base_ = ['_base_/jpeg40.py', '_base_/schedule_1600k.py']

model = dict(backbone=dict(
    type='vmamba_mm.MambaIR', arch='denoise', in_channels=1, drop_path_rate=0.1))
auto_scale_lr = dict(base_batch_size=16)
