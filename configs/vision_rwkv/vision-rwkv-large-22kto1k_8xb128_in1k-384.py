# Fine-tuning at 384x384 for 20 epochs, of a classifier of ImageNet-22K: README.md has its address.
# The position embedding stays that of 192 pixels, and is resized.
_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.1),
    head=dict(
        _delete_=True, type='VisionTransformerClsHead', num_classes=1000, in_channels=1024,
        hidden_dim=3072,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    # The published setting never switches from Mixup to CutMix.
    train_cfg=dict(
        _delete_=True, augments=[dict(type='Mixup', alpha=0.8)], probs=[0.5]))

# Crops and flips alone.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=384, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge', scale=438, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='AmpOptimWrapper', clip_grad=dict(max_norm=1.0),
    # Published as 5e-6 for 512 images, with 5e-9 at the beginning and 5e-8 at the end.
    optimizer=dict(lr=1e-5),
    # Unlike in the others, what has one dimension has no decay, but decays and bonuses have it.
    paramwise_cfg=dict(
        flat_decay_mult=0., custom_keys={
            'spatial_decay': dict(decay_mult=1.), 'spatial_first': dict(decay_mult=1.)}))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=2,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=2, end=20,
        convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=20)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]

val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
