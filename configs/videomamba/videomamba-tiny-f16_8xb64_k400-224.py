_base_ = ['_base_/k400_tiny.py']

model = dict(
    backbone=dict(
        arch='tiny_f16',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/tiny.in1k',
            prefix='backbone.', inflate='center')))

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 16
del pipeline
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=_base_.val_pipeline))
test_dataloader = dict(batch_size=8, dataset=dict(pipeline=_base_.test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=8e-4))
