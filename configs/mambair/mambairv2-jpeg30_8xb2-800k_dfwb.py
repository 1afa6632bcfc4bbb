# MambaIRv2, JPEG of the quality 30, started from that for 40 (README.md).
_base_ = ['_base_/jpeg30.py', '_base_/schedule_800k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIRv2', arch='denoise', in_channels=1))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=16)
