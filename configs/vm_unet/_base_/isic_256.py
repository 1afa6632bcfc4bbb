# Photographs of skin lesions at 256x256. Images and masks are those of the authors' archive:
# train/images, train/masks, val/images and val/masks below the root that the leaf names. There is
# no test set: the published numbers are of val, which the epoch was chosen by.
_base_ = ['./vm-unet_300e.py']

size = (256, 256)
metainfo = dict(classes=('background', 'lesion'), palette=[[0, 0, 0], [255, 255, 255]])
data_preprocessor = dict(size=size, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        num_classes=2, out_channels=1, threshold=0.5,
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
            dict(type='vmamba_mm.DiceLoss', per_image=True, smooth=1.0)]))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='vmamba_mm.LoadBinaryAnnotations', threshold=128),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    # The public code draws one angle for the whole run.
    dict(type='RandomRotate', prob=0.5, degree=180, pad_val=0, seg_pad_val=0),
    dict(type='Resize', scale=size, keep_ratio=False),
    dict(type='PackSegInputs'),
]
# Measured at the size of the image, as mmseg does; the public code resizes the masks to 256x256.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=False),
    dict(type='vmamba_mm.LoadBinaryAnnotations', threshold=128),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(
    type='BaseSegDataset', metainfo=metainfo, img_suffix='.png',
    data_prefix=dict(img_path='train/images', seg_map_path='train/masks'),
    pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(
    type='BaseSegDataset', metainfo=metainfo, img_suffix='.png',
    data_prefix=dict(img_path='val/images', seg_map_path='val/masks'),
    pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice'])
test_evaluator = val_evaluator

# Not restarted: the rate goes down for 50 epochs and up again for 50.
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=50, eta_min=1e-5, by_epoch=True, begin=0, end=300)]
