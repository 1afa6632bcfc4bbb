_base_ = ['_base_/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.15,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://ravlt/small', prefix='backbone.',
            weights='model')),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
