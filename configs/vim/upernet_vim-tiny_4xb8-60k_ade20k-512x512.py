_base_ = ['../_base_/tasks/upernet_60k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.Vim',
        arch=dict(base='tiny', image_size=512, cls_token='none'),
        out_indices=(5, 11, 17, 23),
        # What each of these blocks adds, and not the sum of all blocks up to there.
        features='mixer',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/tiny.in1k', prefix='backbone.')),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192))

optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    # The rates of the blocks should fall towards the stem by 0.92 a block. The published code looks
    # for them under another name, so that only the stem's are lower, by 0.92 ** 25: it is kept.
    paramwise_cfg=dict(
        norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.,
        custom_keys={
            'patch_embed': dict(lr_mult=0.1244), 'pos_embed': dict(lr_mult=0.1244),
            'patch_embed.proj.bias': dict(lr_mult=0.1244, decay_mult=0.)}))
