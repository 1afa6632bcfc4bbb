# Lightweight MambaIR, super-resolution x2.
_base_ = ['_base_/div2k_x2.py', '_base_/schedule_500k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIR', arch='light_x2', drop_path_rate=0.1))
train_dataloader = dict(batch_size=16)
auto_scale_lr = dict(base_batch_size=32)
