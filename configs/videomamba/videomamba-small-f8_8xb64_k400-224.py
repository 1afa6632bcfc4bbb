_base_ = ['_base_/k400_small.py']

model = dict(
    backbone=dict(
        arch='small_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/small.in1k',
            prefix='backbone.', inflate='center')))

optim_wrapper = dict(optimizer=dict(lr=8e-4))
