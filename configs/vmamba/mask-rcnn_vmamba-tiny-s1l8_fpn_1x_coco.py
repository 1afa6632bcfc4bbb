_base_ = ['../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/tiny_s1l8', prefix='backbone.')),
    neck=dict(in_channels=[96, 192, 384, 768]))
