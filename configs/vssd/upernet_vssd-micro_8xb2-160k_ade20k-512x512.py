# The file of this model was published, its config was not: the drop path is that of the classifier.
_base_ = ['../_base_/tasks/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VSSD',
        arch='micro',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vssd/micro', prefix='backbone.',
            weights='model')),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192))
