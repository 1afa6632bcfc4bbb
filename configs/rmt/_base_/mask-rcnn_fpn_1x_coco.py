# Mask R-CNN, 8 GPUs x 2 images, 12 epochs, as RMT's authors trained it: a higher rate, and fp16.
_base_ = ['../../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    # The leaf names arch, drop_path_rate and init_cfg.
    backbone=dict(_delete_=True, type='vmamba_mm.RMT'),
    neck=dict(in_channels=[64, 128, 256, 512]))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(lr=4e-4),
    # The published rule, "norm" in the name, misses the numbered batch norms of the stem and finds
    # those between the stages.
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(decay_mult=1.), 'downsample.norm': dict(decay_mult=0.)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
sync_bn = 'torch'
