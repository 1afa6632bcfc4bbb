# Slices of abdominal CT volumes with 8 organs, as mmseg's converter of Synapse writes them.
_base_ = ['_base_/vm-unet_300e.py']

size = (224, 224)
# Grey values from 0 to 1.
data_preprocessor = dict(size=size, mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0])
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        num_classes=9,
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_weight=1.0),
            # Of all classes, the background too.
            dict(type='vmamba_mm.DiceLoss', per_image=False, squared=True, smooth=1e-5)]))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomRotFlip', rotate_prob=0.5, flip_prob=0.5, degree=20),
    dict(type='Resize', scale=size, keep_ratio=False),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=False),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(
    type='SynapseDataset', data_root='data/synapse/',
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
    pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(
    type='SynapseDataset', data_root='data/synapse/',
    data_prefix=dict(img_path='img_dir/val', seg_map_path='ann_dir/val'),
    pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mDice'])
test_evaluator = val_evaluator

param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=100, eta_min=1e-5, by_epoch=True, begin=0, end=300)]
