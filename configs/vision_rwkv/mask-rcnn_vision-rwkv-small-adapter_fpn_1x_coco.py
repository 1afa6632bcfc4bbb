_base_ = ['_base_/mask-rcnn_adapter_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vision_rwkv/small', prefix='backbone.')),
    neck=dict(in_channels=[384, 384, 384, 384]))
