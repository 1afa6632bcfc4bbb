_base_ = ['_base_/mask-rcnn_fpn_ms-3x_coco.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.15,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/small', prefix='backbone.')))
