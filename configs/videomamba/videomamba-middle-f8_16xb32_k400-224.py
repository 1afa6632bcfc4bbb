_base_ = ['_base_/k400_middle.py']

model = dict(
    backbone=dict(
        arch='middle_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle.in1k',
            prefix='backbone.', inflate='center')))

train_dataloader = dict(batch_size=32)
val_dataloader = dict(batch_size=32)
# Published as 2e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
optim_wrapper = dict(optimizer=dict(lr=8e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=5, end=50,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50)
