# Mask R-CNN, 8 GPUs x 2 images, 12 epochs, in fp16 with synchronised batch norms.
_base_ = ['../../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    # The leaf names arch, drop_path_rate, init_cfg and the channels of the maps.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT'))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    # The published rule, "norm" in the name, misses the numbered batch norms of the stem and finds
    # those between the stages.
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(decay_mult=1.), 'downsample.norm': dict(decay_mult=0.)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
sync_bn = 'torch'
