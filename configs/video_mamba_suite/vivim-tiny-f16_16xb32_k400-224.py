_base_ = ['_base_/k400_vivim.py']

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/tiny.in1k', prefix='backbone.',
            from_vim=True)),
    head=dict(in_channels=192))

# rand-m5-n2-mstd0.25-inc1
train_pipeline = _base_.train_pipeline
train_pipeline[1].transforms[0].transforms[0].update(
    num_policies=2, magnitude_level=5, magnitude_std=0.25)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
