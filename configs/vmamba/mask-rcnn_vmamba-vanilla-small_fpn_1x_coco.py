_base_ = ['../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.VMamba',
        arch='vanilla_small',
        # Not set in the released config: Swin-T's 0.2 stayed in place for all three vanilla sizes.
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/vanilla_small', prefix='backbone.')),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.dense_decay_vanilla))
