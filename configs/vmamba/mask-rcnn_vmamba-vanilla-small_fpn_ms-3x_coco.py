_base_ = [
    './_base_/vmamba-vanilla-small.py',
    '../_base_/tasks/mask-rcnn_fpn_ms-3x_coco.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        # Not set in the released config: Swin-T's 0.2 stayed in place for all three vanilla sizes.
        drop_path_rate=0.2,
        init_cfg=_base_.vmamba_pretrained),
    neck=dict(in_channels=_base_.vmamba_channels))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.dense_decay_vanilla))
