# Cascade Mask R-CNN on a backbone of one stride, on COCO with large-scale jitter at 1024x1024,
# 4 GPUs x 16 images, 100 epochs: ViTDet's recipe (arXiv 2203.16527) in fp16.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmdet::common/lsj-100e_coco-instance.py',
    '../vmamba_mm.py',
]

norm_cfg = dict(type='vmamba_mm.LayerNorm2d', eps=1e-6)
image_size = (1024, 1024)
batch_augments = [dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
first, second, third = (dict(head, type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg)
                        for head in _base_.model.roi_head.bbox_head)
model = dict(
    data_preprocessor=dict(batch_augments=batch_augments),
    neck=dict(_delete_=True, type='vmamba_mm.SimpleFeaturePyramid', out_channels=256),
    rpn_head=dict(num_convs=2),
    roi_head=dict(bbox_head=[first, second, third], mask_head=dict(norm_cfg=norm_cfg)))

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=image_size, recompute_bbox=True,
         allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    # The mean, blue first: what is padded is 0 to the model.
    dict(type='Pad', size=image_size, pad_val=dict(img=(103.53, 116.28, 123.675))),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
# Images come as they are drawn, without an end, in place of four rounds a time.
train_dataloader = dict(
    batch_size=16, num_workers=8, sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        _delete_=True, type='CocoDataset', data_root='data/coco/',
        ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32), pipeline=train_pipeline,
        backend_args=None))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='vmamba_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1,
                   fused=True))
# 184,375 iterations of 64 images are 100 epochs.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=184375, milestones=[163889, 177546],
         gamma=0.1),
]
max_iters = 184375
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=2, save_best='coco/bbox_mAP',
                    rule='greater'))
log_processor = dict(by_epoch=False)
