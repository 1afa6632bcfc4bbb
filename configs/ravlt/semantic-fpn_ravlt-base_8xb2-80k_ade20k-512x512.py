_base_ = ['_base_/semantic-fpn_80k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://ravlt/base', prefix='backbone.',
            weights='model')),
    neck=dict(in_channels=[96, 192, 384, 512]))
