_base_ = ['../../_base_/tasks/retinanet_fpn_1x_coco.py']

model = dict(
    # The leaf names arch, drop_path_rate and init_cfg.
    backbone=dict(_delete_=True, type='vmamba_mm.RMT', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[128, 256, 512]))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale=512.0,
    optimizer=dict(lr=4e-4),
    # As of Mask R-CNN, in mask-rcnn_fpn_1x_coco.py.
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(decay_mult=1.), 'downsample.norm': dict(decay_mult=0.)}))
sync_bn = 'torch'
