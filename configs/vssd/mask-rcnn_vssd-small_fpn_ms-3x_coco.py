_base_ = ['../_base_/tasks/mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VSSD',
        arch='small',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vssd/small', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[64, 128, 256, 512]))
