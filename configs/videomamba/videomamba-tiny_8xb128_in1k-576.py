_base_ = ['_base_/imagenet_576.py', '_base_/auto_augment_v0.py']

model = dict(
    backbone=dict(
        arch='tiny_576',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/tiny_448.in1k',
            prefix='backbone.')),
    head=dict(
        in_channels=192,
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='vmamba_mm://videomamba/tiny_448.in1k',
            prefix='head.')))

# Weaker augmentation, as published: AutoAugment in place of RandAugment, and no repeats.
train_pipeline = _base_.train_pipeline
train_pipeline[3] = dict(
    type='AutoAugment', policies=_base_.policies, hparams=train_pipeline[3].hparams)
train_dataloader = dict(
    batch_size=128, dataset=dict(pipeline=train_pipeline),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(lr=1e-5))
_base_.param_scheduler[0].start_factor = 0.1
param_scheduler = _base_.param_scheduler
auto_scale_lr = dict(base_batch_size=1024)
