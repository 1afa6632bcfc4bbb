_base_ = ['_base_/breakfast_tiny.py']

model = dict(
    backbone=dict(
        arch='tiny_f32',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/tiny_f32.k400',
            prefix='backbone.')))

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 32
del pipeline
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=_base_.val_pipeline))
test_dataloader = dict(batch_size=4, dataset=dict(pipeline=_base_.test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=4e-4))
auto_scale_lr = dict(base_batch_size=256)
