_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='base_m2',
        out_indices=(3, ),
        drop_path_rate=0.3),
    head=dict(in_channels=1024))
