# The published model was trained with a teacher: videomamba-base-distill_16xb128_in1k-224.py.
_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.5),
    head=dict(in_channels=768))

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
# 5e-7 -> 2e-3 -> 5e-6
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, by_epoch=True, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=20, end=300),
]
auto_scale_lr = dict(base_batch_size=2048)
