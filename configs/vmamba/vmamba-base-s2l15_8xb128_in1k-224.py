_base_ = [
    './_base_/vmamba-base-s2l15.py',
    '../_base_/tasks/imagenet_224.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        out_indices=(3, ),
        drop_path_rate=0.6),
    head=dict(in_channels=_base_.vmamba_channels[-1]))
