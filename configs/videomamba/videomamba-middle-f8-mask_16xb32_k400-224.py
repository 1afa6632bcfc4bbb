_base_ = ['_base_/k400_middle_mask.py']

model = dict(
    backbone=dict(
        arch='middle_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle_f8.k400_mask_pt',
            prefix='backbone.')))

train_dataloader = dict(batch_size=32)
val_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
