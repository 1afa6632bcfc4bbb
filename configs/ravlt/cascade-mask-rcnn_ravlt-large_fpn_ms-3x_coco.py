_base_ = ['_base_/cascade-mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.55,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://ravlt/large', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[96, 192, 448, 640]))
