# MambaIR, colour noise of 15.
_base_ = ['_base_/noise15.py', '_base_/schedule_1600k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIR', arch='denoise', drop_path_rate=0.1))
auto_scale_lr = dict(base_batch_size=16)
