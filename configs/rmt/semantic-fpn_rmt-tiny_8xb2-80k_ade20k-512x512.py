_base_ = ['_base_/semantic-fpn_80k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/tiny', prefix='backbone.')))
