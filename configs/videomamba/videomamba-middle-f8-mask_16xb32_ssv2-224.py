_base_ = ['_base_/ssv2_middle_mask.py']

model = dict(
    backbone=dict(
        arch='middle_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle_f8.ssv2_mask_pt',
            prefix='backbone.')))

train_dataloader = dict(batch_size=32)
val_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
