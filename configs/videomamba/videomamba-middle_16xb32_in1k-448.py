_base_ = ['_base_/imagenet_448.py']

model = dict(
    backbone=dict(
        arch='middle_448',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/middle.in1k',
            prefix='backbone.')),
    head=dict(
        in_channels=576,
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='vmamba_mm://videomamba/middle.in1k',
            prefix='head.')))

train_dataloader = dict(batch_size=32)
auto_scale_lr = dict(base_batch_size=512)
