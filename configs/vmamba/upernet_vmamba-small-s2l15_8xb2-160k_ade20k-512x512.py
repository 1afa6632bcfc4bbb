_base_ = [
    './_base_/vmamba-small-s2l15.py',
    '../_base_/tasks/upernet_160k_ade20k-512x512.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        drop_path_rate=0.3,
        init_cfg=_base_.vmamba_pretrained),
    decode_head=dict(in_channels=_base_.vmamba_channels),
    auxiliary_head=dict(in_channels=_base_.vmamba_channels[2]))
