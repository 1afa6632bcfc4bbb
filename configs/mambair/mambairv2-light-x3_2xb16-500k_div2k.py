# Lightweight MambaIRv2, super-resolution x3.
_base_ = ['_base_/div2k_x3.py', '_base_/schedule_500k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIRv2', arch='light_x3'))
train_dataloader = dict(batch_size=16)
auto_scale_lr = dict(base_batch_size=32)
