_base_ = ['_base_/ssv2_middle.py']

model = dict(
    backbone=dict(
        arch='middle_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle.in1k',
            prefix='backbone.', inflate='center')))

train_dataloader = dict(batch_size=32)
val_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
