_base_ = ['_base_/mask-rcnn_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/large', prefix='backbone.')),
    neck=dict(in_channels=[112, 224, 448, 640]))

optim_wrapper = dict(optimizer=dict(lr=2e-4))
