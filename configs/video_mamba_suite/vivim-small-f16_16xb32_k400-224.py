_base_ = ['_base_/k400_vivim.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.35,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/small.in1k', prefix='backbone.',
            from_vim=True)),
    head=dict(in_channels=384))

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
# Published as 2e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=5, end=50,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50)
