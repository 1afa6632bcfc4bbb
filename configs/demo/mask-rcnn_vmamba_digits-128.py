# `make demo-det`: digits on photographs as a COCO set. The model, the losses and the loop are
# those of the COCO config; the sizes fit 128 x 128 images with digits of 12 to 50 pixels.
_base_ = ['../vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py', 'small_vmamba.py']

width = 64  # of the pyramid and of the heads, instead of 256
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    # As the published recipe does, it starts from a classifier: the one that `make demo` trains.
    backbone=dict(arch=_base_.small_arch, drop_path_rate=0.0, init_cfg=_base_.small_pretrained),
    neck=dict(in_channels=_base_.small_channels, out_channels=width),
    rpn_head=dict(
        in_channels=width, feat_channels=width,
        anchor_generator=dict(scales=[4])),  # from 16 pixels, instead of 32
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=16),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=width, finest_scale=16),
        mask_head=dict(in_channels=width, conv_out_channels=width, num_convs=2, num_classes=10)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(max_per_img=20)))

# No horizontal flip: a mirrored 2 is no 2, and a mirrored 3 or 5 looks like another digit.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

root = 'data/demo/coco/'
digits = dict(classes=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight',
                       'nine'))
train_dataloader = dict(
    batch_size=8, num_workers=1,
    dataset=dict(data_root=root, metainfo=digits, filter_cfg=dict(min_size=8),
                 pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=root, metainfo=digits, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True,
         milestones=[max_epochs - 1], gamma=0.1),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
