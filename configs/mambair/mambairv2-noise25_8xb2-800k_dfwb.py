# MambaIRv2, colour noise of 25, started from that for 15 (README.md).
_base_ = ['_base_/noise25.py', '_base_/schedule_800k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIRv2', arch='denoise'))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=16)
