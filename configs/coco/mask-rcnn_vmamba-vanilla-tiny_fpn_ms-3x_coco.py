_base_ = [
    '../_base_/backbones/vmamba-vanilla-tiny.py',
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

# PatchMerging's norm was named such that the released rule found it; the conv
# downsample's norm was not (see ../_base_/schedules/dense_decay.py).
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'downsample.norm': dict(decay_mult=0.)}))
