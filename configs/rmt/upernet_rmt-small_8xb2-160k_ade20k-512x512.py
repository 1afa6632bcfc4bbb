_base_ = ['_base_/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.15,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/small', prefix='backbone.')))
