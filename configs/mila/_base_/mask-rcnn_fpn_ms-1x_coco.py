# Mask R-CNN, 8 GPUs x 2 images, 12 epochs, which have the multi-scale crops of 36 epochs too.
_base_ = ['mask-rcnn_fpn_ms-3x_coco.py']

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
