# Remote-sensing images at 224x224: 500 epochs from random weights, in fp32. The paper has batches
# of 1024 images and the published files 16 on each GPU; how many GPUs there were is not said.
_base_ = ['mmpretrain::_base_/default_runtime.py', '../../_base_/vmamba_mm.py']

model = dict(
    type='ImageClassifier',
    # The leaf names the arch, and the head's in_channels.
    backbone=dict(type='vmamba_mm.RSMamba', out_type='avg_featmap'),
    neck=None,
    head=dict(
        type='LinearClsHead',
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.4, 1.0), backend='pillow',
         interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='AutoAugment', policies='imagenet'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
# The base of each data set names data_root and classes. The lists, with CLASS/FILE in each line,
# are those of the authors' repository, datainfo/*/train.txt and val.txt.
train_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='vmamba_mm.ImageListDataset', ann_file='train.txt', data_prefix='images',
                 pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='vmamba_mm.ImageListDataset', ann_file='val.txt', data_prefix='images',
                 pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='SingleLabelMetric')
test_evaluator = val_evaluator

# All parameters decay, biases and norms as well.
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=10,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=10, end=500),
]
train_cfg = dict(by_epoch=True, max_epochs=500, val_interval=20)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)

# The published numbers are those of the epoch with the best F1 on what they were measured on.
default_hooks = dict(checkpoint=dict(
    interval=20, max_keep_ckpts=3, save_best='single-label/f1-score', rule='greater'))
