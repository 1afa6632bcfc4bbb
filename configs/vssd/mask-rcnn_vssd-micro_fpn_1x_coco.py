_base_ = ['../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VSSD',
        arch='micro',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vssd/micro', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[48, 96, 192, 384]))
