# Lightweight MambaIR, super-resolution x3, started from that for x2 (README.md).
_base_ = ['_base_/div2k_x3.py', '_base_/schedule_500k.py']

model = dict(backbone=dict(type='vmamba_mm.MambaIR', arch='light_x3', drop_path_rate=0.1))
train_dataloader = dict(batch_size=16)
auto_scale_lr = dict(base_batch_size=32)
