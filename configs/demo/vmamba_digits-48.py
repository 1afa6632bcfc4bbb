# `make demo`: digits on photographs, ten ImageNet folders. The recipe is the ImageNet one, in its
# pipeline, its losses, its EMA and its schedule; what differs is the size of things.
_base_ = ['../vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py', 'small_vmamba.py']

model = dict(
    backbone=dict(arch=_base_.small_arch, drop_path_rate=0.0),
    head=dict(in_channels=_base_.small_channels[-1], num_classes=10),
    # One batch of five is mixed, instead of every one: the few epochs of a demo are short.
    train_cfg=dict(probs=[0.1, 0.1]))
data_preprocessor = dict(num_classes=10)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    # The whole digit stays in view: ImageNet's crops go down to 8 % of the image.
    dict(type='RandomResizedCrop', scale=48, crop_ratio_range=(0.75, 1.0), backend='pillow',
         interpolation='bicubic'),
    # No horizontal flip: a mirrored 2 is no 2, and a mirrored 3 or 5 looks like another digit.
    dict(type='RandAugment', policies='timm_increasing', num_policies=1, total_level=10,
         magnitude_level=3, magnitude_std=0.5,
         hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic')),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02,
         max_area_ratio=0.1, fill_color=[103.53, 116.28, 123.675],
         fill_std=[57.375, 57.12, 58.395]),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=52, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=48),
    dict(type='PackInputs'),
]

# The folders are read in alphabetical order, as ImageNet's are.
digits = dict(classes=['eight', 'five', 'four', 'nine', 'one', 'seven', 'six', 'three', 'two',
                       'zero'])
root = 'data/demo/imagenet'
train_dataloader = dict(
    batch_size=32, num_workers=1,
    dataset=dict(data_root=root, metainfo=digits, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=100, num_workers=1,
    dataset=dict(data_root=root, metainfo=digits, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=1, end=max_epochs,
         convert_to_iter_based=True),
]
# fp32 on every machine, so that CPU and GPU give the same numbers
val_cfg = dict(fp16=False)
test_cfg = dict(fp16=False)
# An average over about 50 steps, in place of 10,000
custom_hooks = [dict(type='EMAHook', momentum=0.02, priority='ABOVE_NORMAL')]
default_hooks = dict(
    logger=dict(interval=25), checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
