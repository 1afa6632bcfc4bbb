_base_ = ['_base_/ssv2_tiny.py']

model = dict(
    backbone=dict(
        arch='tiny_f8',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/tiny.in1k',
            prefix='backbone.', inflate='center')))

optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
