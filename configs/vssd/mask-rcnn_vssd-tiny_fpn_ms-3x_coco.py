_base_ = ['../_base_/tasks/mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VSSD',
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vssd/tiny', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[64, 128, 256, 512]))
