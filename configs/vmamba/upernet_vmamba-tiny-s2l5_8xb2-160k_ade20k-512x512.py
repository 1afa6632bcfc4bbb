# The released results table links this row to the config of T[s1l8] by mistake.
_base_ = [
    './_base_/vmamba-tiny-s2l5.py',
    '../_base_/tasks/upernet_160k_ade20k-512x512.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        drop_path_rate=0.2,
        init_cfg=_base_.vmamba_pretrained),
    decode_head=dict(in_channels=_base_.vmamba_channels),
    auxiliary_head=dict(in_channels=_base_.vmamba_channels[2]))
