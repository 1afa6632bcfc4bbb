# MambaIR, JPEG of the quality 10, started from that for 40 (README.md).
_base_ = ['_base_/jpeg10.py', '_base_/schedule_800k.py']

model = dict(backbone=dict(
    type='vmamba_mm.MambaIR', arch='denoise', in_channels=1, drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=16)
