_base_ = ['../_base_/tasks/upernet_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='vanilla_tiny',
        # Not set in the released config: Swin-T's 0.3 stayed in place for all three vanilla sizes.
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/vanilla_tiny', prefix='backbone.')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.dense_decay_vanilla))
