_base_ = ['_base_/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://rmt/large', prefix='backbone.')),
    decode_head=dict(in_channels=[112, 224, 448, 640]),
    auxiliary_head=dict(in_channels=448))
