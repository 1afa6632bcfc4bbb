_base_ = ['_base_/breakfast_small.py']

model = dict(
    backbone=dict(
        arch='small_f64',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/small_f64.k400',
            prefix='backbone.')))

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 64
del pipeline
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=_base_.val_pipeline))
test_dataloader = dict(batch_size=1, dataset=dict(pipeline=_base_.test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=128)
