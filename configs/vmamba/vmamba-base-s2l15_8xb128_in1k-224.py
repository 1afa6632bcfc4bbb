_base_ = ['../_base_/tasks/imagenet_224.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='base_s2l15',
        out_indices=(3, ),
        drop_path_rate=0.6),
    head=dict(in_channels=1024))
