# `make demo-seg`: digits on photographs as an ADE20K set. The model, the losses and the loop are
# those of the ADE20K config; the sizes fit 128 x 128 images.
_base_ = ['../vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py', 'small_vmamba.py']

digits = dict(
    # Label 0 of the files means 'not labelled'; with reduce_zero_label, 1 becomes class 0.
    classes=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine',
             'photograph'),
    palette=[[230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
             [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212],
             [40, 40, 40]])
size = (128, 128)
# Each digit covers less than 1 % of the pixels. Runs of 600 steps without weights ended with
# everything called photograph.
class_weight = [1.0] * 10 + [0.1]
model = dict(
    data_preprocessor=dict(size=size),
    # As the published recipe does, it starts from a classifier: the one that `make demo` trains.
    backbone=dict(arch=_base_.small_arch, drop_path_rate=0.0, init_cfg=_base_.small_pretrained),
    decode_head=dict(
        in_channels=_base_.small_channels, channels=48, num_classes=11,
        loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(
        in_channels=_base_.small_channels[2], channels=32, num_classes=11,
        loss_decode=dict(class_weight=class_weight)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=size, ratio_range=(0.9, 1.4), keep_ratio=True),
    # cat_max_ratio 1: nine tenths of every image are photograph, and that is right
    dict(type='RandomCrop', crop_size=size, cat_max_ratio=1.0),
    # No horizontal flip: a mirrored 2 is no 2, and a mirrored 3 or 5 looks like another digit.
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]

# BaseSegDataset: ADE20KDataset in all but its list of 150 classes, which admits no other names
root = 'data/demo/ade20k'
demo_set = dict(type='BaseSegDataset', data_root=root, metainfo=digits, img_suffix='.png',
                seg_map_suffix='.png', reduce_zero_label=True)
train_dataloader = dict(batch_size=8, num_workers=1,
                        dataset=dict(pipeline=train_pipeline, **demo_set))
val_dataloader = dict(batch_size=1, num_workers=1,
                      dataset=dict(pipeline=test_pipeline, **demo_set))
test_dataloader = val_dataloader

max_iters = 500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 5)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=50, end=max_iters, by_epoch=False),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1))
