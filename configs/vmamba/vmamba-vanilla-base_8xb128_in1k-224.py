_base_ = ['../_base_/tasks/imagenet_224.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='vanilla_base',
        out_indices=(3, ),
        # The released recipe file says 0.5; the published weights ("dp06") were trained with 0.6.
        drop_path_rate=0.6),
    head=dict(in_channels=1024))
