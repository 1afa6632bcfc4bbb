_base_ = ['_base_/mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/base', prefix='backbone.')),
    neck=dict(in_channels=[80, 160, 320, 512]))

optim_wrapper = dict(optimizer=dict(lr=2e-4))
