_base_ = ['_base_/mask-rcnn_adapter_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vision_rwkv/base', prefix='backbone.')),
    neck=dict(in_channels=[768, 768, 768, 768]))
