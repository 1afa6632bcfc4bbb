_base_ = ['_base_/k400_middle_mask.py']

model = dict(
    backbone=dict(
        arch='middle_f64_384',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle_f64.k400_mask',
            prefix='backbone.')),
    head=dict(init_cfg=dict(
        _delete_=True, type='Pretrained', checkpoint='vmamba_mm://videomamba/middle_f64.k400_mask',
        prefix='head.')))

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 64
del pipeline
_base_.train_pipeline[1].transforms[0].transforms[1].scale = 384
_base_.val_pipeline[1].transforms[0].scale = 384
_base_.val_pipeline[1].transforms[1].crop_size = 384
_base_.test_pipeline[1].transforms[0].scale = 384
_base_.test_pipeline[2].crop_size = 384
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=_base_.val_pipeline))
test_dataloader = dict(batch_size=1, dataset=dict(pipeline=_base_.test_pipeline))
# Published as 5e-6 for 256 samples, from and to 1e-6 before the factor for the batch.
optim_wrapper = dict(optimizer=dict(lr=1.25e-6, weight_decay=1e-8), accumulative_counts=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.2, by_epoch=True, begin=1, end=6,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=6)
auto_scale_lr = dict(base_batch_size=32)
