_base_ = ['_base_/imagenet_576.py']

model = dict(
    backbone=dict(
        arch='small_576',
        drop_path_rate=0.15,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/small_448.in1k',
            prefix='backbone.')),
    head=dict(
        in_channels=384,
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='vmamba_mm://videomamba/small_448.in1k',
            prefix='head.')))

train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)
