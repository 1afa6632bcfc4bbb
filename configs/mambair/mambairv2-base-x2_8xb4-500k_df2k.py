# MambaIRv2 (base), super-resolution x2.
_base_ = ['_base_/df2k_x2.py', '_base_/schedule_500k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIRv2', arch='base_x2'))
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
auto_scale_lr = dict(base_batch_size=32)
