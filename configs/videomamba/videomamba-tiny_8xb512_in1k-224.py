_base_ = ['_base_/imagenet_224.py', '_base_/auto_augment_v0.py']

model = dict(
    backbone=dict(
        arch='tiny'),
    head=dict(in_channels=192))

# Weaker augmentation, as published: AutoAugment in place of RandAugment, and no repeats.
train_pipeline = _base_.train_pipeline
train_pipeline[3] = dict(
    type='AutoAugment', policies=_base_.policies, hparams=train_pipeline[3].hparams)
train_dataloader = dict(
    batch_size=512, dataset=dict(pipeline=train_pipeline),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
