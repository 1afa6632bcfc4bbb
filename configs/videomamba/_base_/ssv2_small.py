# The published recipe of small on Something-Something v2, from ImageNet-1K.
# A leaf config names frames, batch and weights.
_base_ = ['../../_base_/tasks/video_ssv2.py']

model = dict(
    backbone=dict(type='vmamba_mm.VideoMamba', out_type='cls_token', drop_path_rate=0.35),
    head=dict(in_channels=384,
              init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.)))

# The published code decays the rate by layers, but finds no layer of a VideoMamba: all blocks
# learn at full rate, and the temporal embedding too, and what is before them at 7.5e-4 of it.
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(lr_mult=0.75 ** 25),
        'patch_embed.proj.bias': dict(lr_mult=0.75 ** 25, decay_mult=0.),
        'spatial_pos_embed': dict(lr_mult=0.75 ** 25, decay_mult=0.),
        'cls_token': dict(lr_mult=0.75 ** 25, decay_mult=0.)}))
# Published as 4e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=2.5e-3, by_epoch=True, begin=5, end=30,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
