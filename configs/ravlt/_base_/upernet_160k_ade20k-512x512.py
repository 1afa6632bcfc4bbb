_base_ = ['../../_base_/tasks/upernet_160k_ade20k-512x512.py']

model = dict(
    # The leaf names arch, drop_path_rate, init_cfg and the channels of the maps.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT'))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale=512.0,
    # As in detection, of Mask R-CNN (mask-rcnn_fpn_1x_coco.py).
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(decay_mult=1.), 'downsample.norm': dict(decay_mult=0.)}))
sync_bn = 'torch'
