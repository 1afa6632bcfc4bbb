_base_ = ['_base_/mask-rcnn_adapter_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        arch=dict(base='tiny', layer_scale=1.0),
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vision_rwkv/tiny', prefix='backbone.')),
    neck=dict(in_channels=[192, 192, 192, 192]))

optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
