_base_ = ['_base_/mask-rcnn_fpn_ms-1x_coco.py']

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://mila/tiny', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[64, 128, 256, 512]))
