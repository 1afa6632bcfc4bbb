# MambaIR, super-resolution x4, started from that for x2 (README.md).
_base_ = ['_base_/df2k_x4.py', '_base_/schedule_250k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIR', arch='sr_x4', drop_path_rate=0.1))
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=32)
