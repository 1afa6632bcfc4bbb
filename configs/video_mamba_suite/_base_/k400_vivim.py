# What the published recipes of ViViM on Kinetics-400 share: VideoMamba's scripts, with 16 frames,
# 16 GPUs x 32 videos x 2 augmentations, from Vim's ImageNet-1K weights.
_base_ = ['../../_base_/tasks/video_k400.py']

model = dict(
    backbone=dict(type='vmamba_mm.ViViM', out_type='cls_token'),
    head=dict(init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.)))

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 16
del pipeline
train_pipeline = _base_.train_pipeline
val_pipeline = _base_.val_pipeline
test_pipeline = _base_.test_pipeline
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline))

# The published code decays the rate by layers, but finds no layer of a ViViM: all blocks learn at
# full rate, and the temporal embedding too, and what is before them at 7.5e-4 of it.
optim_wrapper = dict(
    optimizer=dict(lr=8e-4),
    paramwise_cfg=dict(custom_keys={
        'patch_embed': dict(lr_mult=0.75 ** 25),
        'patch_embed.proj.bias': dict(lr_mult=0.75 ** 25, decay_mult=0.),
        'pos_embed': dict(lr_mult=0.75 ** 25, decay_mult=0.),
        'cls_token': dict(lr_mult=0.75 ** 25, decay_mult=0.),
        'temporal_embedding': dict(decay_mult=0.)}))
