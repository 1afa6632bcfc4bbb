_base_ = ['../../_base_/tasks/retinanet_fpn_1x_coco.py']

model = dict(
    # The leaf names arch, drop_path_rate, init_cfg and the channels of the maps.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT', out_indices=(1, 2, 3)))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale=512.0,
    # Everything has decay.
    paramwise_cfg=dict(_delete_=True))
sync_bn = 'torch'
