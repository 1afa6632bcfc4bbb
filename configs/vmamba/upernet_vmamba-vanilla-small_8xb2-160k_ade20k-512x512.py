_base_ = [
    './_base_/vmamba-vanilla-small.py',
    '../_base_/tasks/upernet_160k_ade20k-512x512.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        # Not set in the released config: Swin-T's 0.3 stayed in place for all three vanilla sizes.
        drop_path_rate=0.3,
        init_cfg=_base_.vmamba_pretrained),
    decode_head=dict(in_channels=_base_.vmamba_channels),
    auxiliary_head=dict(in_channels=_base_.vmamba_channels[2]))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.dense_decay_vanilla))
