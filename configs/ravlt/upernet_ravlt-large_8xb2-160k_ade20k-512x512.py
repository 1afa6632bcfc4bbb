_base_ = ['_base_/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.55,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://ravlt/large', prefix='backbone.',
            weights='model')),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448))
