_base_ = [
    './_base_/vmamba-base-s2l15.py',
    '../_base_/tasks/mask-rcnn_fpn_1x_coco.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.vmamba,
        drop_path_rate=0.6,
        init_cfg=_base_.vmamba_pretrained),
    neck=dict(in_channels=_base_.vmamba_channels))
