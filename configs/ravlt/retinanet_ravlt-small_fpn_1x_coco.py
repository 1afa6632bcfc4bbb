_base_ = ['_base_/retinanet_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.15,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://ravlt/small', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[128, 320, 512]))
