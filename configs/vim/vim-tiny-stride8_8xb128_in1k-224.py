_base_ = ['_base_/imagenet_stride8.py']

model = dict(
    backbone=dict(
        arch='tiny_stride8',
        # As the published model was started: the position embedding as if the class token were the
        # first one. Without resize it is brought to its size as it stands.
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/tiny.in1k', prefix='backbone.',
            resize='published')),
    head=dict(
        in_channels=192,
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='vmamba_mm://vim/tiny.in1k',
            prefix='head.')))
