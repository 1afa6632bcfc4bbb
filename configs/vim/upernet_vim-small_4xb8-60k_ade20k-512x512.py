_base_ = ['../_base_/tasks/upernet_60k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.Vim',
        # The published run also had rope='both', as its ImageNet model, which is not released, had.
        arch=dict(base='small', image_size=512, cls_token='none'),
        out_indices=(5, 11, 17, 23),
        features='stream',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/small.in1k', prefix='backbone.')),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384))

optim_wrapper = dict(
    # As of tiny: of the published layer decay, 0.95, only the stem's part had an effect.
    paramwise_cfg=dict(
        norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.,
        custom_keys={
            'patch_embed': dict(lr_mult=0.2774), 'pos_embed': dict(lr_mult=0.2774),
            'patch_embed.proj.bias': dict(lr_mult=0.2774, decay_mult=0.)}))
