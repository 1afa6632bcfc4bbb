_base_ = ['../../_base_/tasks/mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    # The leaf names arch, drop_path_rate, init_cfg and the channels of the maps.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT'))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    # As of 12 epochs, in mask-rcnn_fpn_1x_coco.py.
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(decay_mult=1.), 'downsample.norm': dict(decay_mult=0.)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
sync_bn = 'torch'
