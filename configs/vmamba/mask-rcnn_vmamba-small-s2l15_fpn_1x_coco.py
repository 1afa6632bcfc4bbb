_base_ = ['../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='small_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/small_s2l15', prefix='backbone.')),
    neck=dict(in_channels=[96, 192, 384, 768]))
