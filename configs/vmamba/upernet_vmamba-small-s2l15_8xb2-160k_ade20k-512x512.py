_base_ = ['../_base_/tasks/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='small_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/small_s2l15', prefix='backbone.')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
