_base_ = ['_base_/semantic-fpn_80k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/large', prefix='backbone.')),
    neck=dict(in_channels=[112, 224, 448, 640]))
